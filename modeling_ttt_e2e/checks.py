"""Checks of a call's arguments, before any work is done. Messages name the argument, its value and the remedy."""

from collections.abc import Callable, Collection

import torch

# Arguments that transformers may hand to any model, with the value that asks these for what they do anyhow.
AS_EVER = {"is_causal": True, "output_router_logits": False}
UNPACK = (
    "what is learned from one would leak into the next. Give each document a row of its own: set packing=False and "
    "padding_free=False in a trainer's arguments."
)
END_OF_POSITIONS = 2**53  # RoPE angles are computed in float64, which holds whole numbers up to here exactly
PACKED = (
    "`position_ids` start again inside a row (row {row}, column {column}: {position} after {highest}): the row holds "
    f"several documents, and {UNPACK}"
)


def check_ids(input_ids: torch.Tensor, vocab_size: int, name: str = "input_ids") -> None:
    """[batch, length] of ids in [0, vocab_size)."""
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"`{name}` must be integers of shape [batch, length], got {input_ids.dtype} {tuple(input_ids.shape)}."
        )
    if input_ids.numel() == 0:
        raise ValueError(f"`{name}` is empty (shape {tuple(input_ids.shape)}): give at least one token per row.")
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"`{name}` holds the id {bad}, outside the vocabulary of {vocab_size} (0..{vocab_size - 1}).")


def check_labels(labels: torch.Tensor, shape: tuple[int, int], vocab_size: int, name: str = "labels") -> None:
    """Labels of the inputs' shape; -100 or ids of the vocabulary."""
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"`{name}` has shape {tuple(labels.shape)}, but the inputs have {tuple(shape)}.")
    bad = labels[(labels != -100) & ((labels < 0) | (labels >= vocab_size))]
    if bad.numel():
        raise ValueError(
            f"`{name}` holds {int(bad[0])}, which is neither -100 (do not predict) nor an id of the vocabulary of "
            f"{vocab_size}."
        )


def real_columns(attention_mask: torch.Tensor | None, shape: tuple[int, int], past_columns: int) -> torch.Tensor | None:
    """The mask of the new columns as bool [batch, length], or None when nothing is padded."""
    if attention_mask is None:
        return None
    rows, columns = shape
    if tuple(attention_mask.shape) not in {(rows, columns), (rows, past_columns + columns)}:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; it must be [batch, length] = {shape}"
            + (f" or, with what was read before, {(rows, past_columns + columns)}." if past_columns else ".")
        )
    real = attention_mask[:, -columns:].bool()
    return None if bool(real.all()) else real


def check_positions(
    position_ids: torch.Tensor, real: torch.Tensor | None, shape: tuple[int, int], next_positions: tuple[int, ...]
) -> torch.Tensor:
    """Positions [batch, length] that grow along each row's tokens and go on from what was read before."""
    rows, columns = shape
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != columns:
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}; it must be [batch, length] = {shape}, or one row."
        )
    position_ids = position_ids.expand(rows, columns)
    seen = torch.tensor(next_positions, device=position_ids.device)[:, None] - 1
    before = position_ids if real is None else position_ids.masked_fill(~real, -1)
    highest = torch.cat([seen, before], dim=1).cummax(dim=1).values[:, :-1]
    wrong = position_ids <= highest
    if real is not None:
        wrong = wrong & real
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        position, above = int(position_ids[row, column]), int(highest[row, column])
        raise ValueError(PACKED.format(row=row, column=column, position=position, highest=above))
    return position_ids


def check_extra_arguments(arguments: dict, known: Collection[str] = ()) -> None:
    """Refuse arguments that a forward pass was given but does not know; None, and what asks for nothing, may stand.

    Raises:
        ValueError: they describe packed documents. TypeError: nobody knows them.
    """
    given = {name: value for name, value in arguments.items() if value is not None and name not in known}
    packed = [name for name in given if name.startswith(("cu_seq_lens", "max_length_", "seq_idx"))]
    if packed:
        raise ValueError(f"Several documents are packed into a row ({packed} say where each begins), and {UNPACK}")
    unknown = sorted(name for name, value in given.items() if value is not AS_EVER.get(name))
    if unknown:
        raise TypeError(f"forward() does not know the arguments {unknown}: remove them.")


def check_not_reentrant(checkpoint: Callable | None) -> None:
    """Check that a function which checkpoints blocks lets the inner gradient pass through them.

    Raises:
        ValueError: it was made with `use_reentrant=True`.
    """
    if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "`use_reentrant=True` cannot checkpoint this model while it learns: the inner gradient needs a graph that "
            "reentrant checkpointing hides. Use `use_reentrant=False`, or `test_time_training=False`."
        )
