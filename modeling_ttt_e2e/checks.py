"""Checks of a call's arguments, before any work is done.

Messages name the argument, its value and the remedy.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers.utils.deprecation import deprecate_kwarg

from .twice_differentiable import is_asynchronous

# Arguments that transformers may hand to any model, with the value that asks these for what they do anyhow.
AS_EVER = {"is_causal": True, "output_router_logits": False}
UNPACK = (
    "what is learned from one would leak into the next. Give each document a row of its own: set packing=False and "
    "padding_free=False in a trainer's arguments."
)
INDICES = (torch.int64, torch.int32)
END_OF_POSITIONS = 2**53  # RoPE angles are computed in float64, which holds whole numbers up to here exactly
PACKED = (
    "`position_ids` start again inside a row (row {row}, column {column}: {position} after {highest}): the row holds "
    f"several documents, and {UNPACK}"
)

OUTSIDE = (
    "`position_ids` holds {position} (row {row}, column {column}): positions lie from 0 to 2**53 - 1; count each row's "
    "tokens, or leave the argument out."
)


def accept_earlier_cache_names(function: Callable) -> Callable:
    """Take `past_key_values` and `cache_params` for the argument `cache`, with a FutureWarning.

    Those are its earlier names, which transformers' models take until their release 5.40.
    """
    for name in ("past_key_values", "cache_params"):
        function = deprecate_kwarg(name, "5.40.0", new_name="cache")(function)
    return function


def any_wrong(wrong: torch.Tensor, message: str) -> bool:
    """Whether a value is wrong. Where a look would wait for the device, that fails by itself, with the message."""
    if is_asynchronous(wrong):
        torch._assert_async(~wrong.any(), message)
        return False
    return bool(wrong.any())


def check_ids(input_ids: torch.Tensor, vocab_size: int, name: str = "input_ids") -> None:
    """[batch, length] of ids in [0, vocab_size); a GPU checks values by itself, and fails a little later."""
    check_tensor(name, input_ids)
    if input_ids.dim() != 2 or input_ids.dtype not in INDICES:
        raise ValueError(
            f"`{name}` must be integers (int64 or int32) of shape [batch, length], got {input_ids.dtype} "
            f"{tuple(input_ids.shape)}."
        )
    if input_ids.numel() == 0:
        raise ValueError(f"`{name}` is empty (shape {tuple(input_ids.shape)}): give at least one token per row.")
    low, high = torch.aminmax(input_ids)
    wrong = (low < 0) | (high >= vocab_size)
    if any_wrong(wrong, f"`{name}` holds an id outside the vocabulary of {vocab_size}"):
        low, high = int(low), int(high)
        bad = low if low < 0 else high
        raise ValueError(f"`{name}` holds the id {bad}, outside the vocabulary of {vocab_size} (0..{vocab_size - 1}).")


def check_embeddings(embeddings: torch.Tensor, hidden_size: int) -> None:
    """[batch, length, hidden_size] of floating numbers, at least one token per row."""
    check_tensor("inputs_embeds", embeddings)
    shape = tuple(embeddings.shape)
    if len(shape) != 3 or 0 in shape or shape[2] != hidden_size or not embeddings.is_floating_point():
        raise ValueError(
            f"`inputs_embeds` must be floating numbers [batch, length, hidden_size = {hidden_size}], not empty, got "
            f"{embeddings.dtype} {shape}."
        )


def one_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> tuple[int, int]:
    """Rows and positions of the one input that is given, whose values are not looked at."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    name, given = ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)
    check_tensor(name, given)
    if given.dim() < 2:
        raise ValueError(f"`{name}` must have a row for each text, [batch, length, ...], got {tuple(given.shape)}.")
    return given.shape[0], given.shape[1]


def check_labels(labels: torch.Tensor, shape: tuple[int, int], vocab_size: int, name: str = "labels") -> None:
    """Labels of the inputs' shape; -100 or ids of the vocabulary, which a GPU checks by itself."""
    check_tensor(name, labels)
    if labels.dtype not in INDICES:
        raise ValueError(f"`{name}` must be integers (int64 or int32), got {labels.dtype}.")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"`{name}` has shape {tuple(labels.shape)}, but the inputs have {tuple(shape)}.")
    wrong = (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    if any_wrong(wrong, f"`{name}` holds what is neither -100 nor an id of the vocabulary of {vocab_size}"):
        raise ValueError(
            f"`{name}` holds {int(labels[wrong][0])}, which is neither -100 (do not predict) nor an id of the "
            f"vocabulary of {vocab_size}."
        )


def check_same_labels(labels: torch.Tensor, shift_labels: torch.Tensor) -> None:
    """Labels that are given both ways, each [batch, length], say the same; the last column has no counterpart."""
    wrong = shift_labels[:, :-1] != labels[:, 1:].to(shift_labels.device)
    if any_wrong(wrong, "`labels` and `shift_labels` disagree: give one of them"):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`labels` and `shift_labels` disagree: after row {row}, column {column} the former have "
            f"{int(labels[row, column + 1])}, the latter {int(shift_labels[row, column])}. Give one of them."
        )


def read_attention_mask(
    attention_mask: torch.Tensor | None, shape: tuple[int, int], positions_read: int
) -> torch.Tensor | None:
    """The mask of the new positions as bool [batch, length], or None when nothing is padded.

    A GPU checks the values by itself, and a mask there is not looked at, so that one without padding is returned too.

    Args:
        attention_mask: 1 for tokens and 0 for padding, in any dtype.
    """
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask)
    rows, positions = shape
    if tuple(attention_mask.shape) not in {(rows, positions), (rows, positions_read + positions)}:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; it must be [batch, length] = {shape}"
            + (f" or, with what was read before, {(rows, positions_read + positions)}." if positions_read else ".")
        )
    wrong = (attention_mask != 0) & (attention_mask != 1)
    token_mask = attention_mask[:, -positions:] == 1
    if any_wrong(wrong, "`attention_mask` must be 1 for tokens and 0 for padding"):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`attention_mask` holds {attention_mask[row, column].item()} (row {row}, column {column}): it must be 1 "
            "for tokens and 0 for padding."
        )
    return token_mask if is_asynchronous(token_mask) or not bool(token_mask.all()) else None


def check_something_to_read(token_mask: torch.Tensor | None, goes_on: bool) -> None:
    """A call of nothing but padding leaves no trace, unless it `goes_on` from a cache or returns one.

    Args:
        token_mask: as `read_attention_mask` returns it.
    """
    if token_mask is None or goes_on:
        return
    if any_wrong(~token_mask.any(), "`attention_mask` is 0 everywhere, so there is nothing to read"):
        raise ValueError(
            "`attention_mask` is 0 everywhere, so there is nothing to read: give at least one row a token, or a "
            "`cache` to go on from."
        )


def check_positions(
    position_ids: torch.Tensor,
    token_mask: torch.Tensor | None,
    shape: tuple[int, int],
    next_positions: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Positions [batch, length] of tokens, small enough for exact angles.

    Args:
        next_positions: of each row, where given: positions must go on from there, and grow along the row's tokens.
    """
    position_ids = expand_positions(position_ids, shape)
    wrong = outside = (position_ids < 0) | (position_ids >= END_OF_POSITIONS)
    if next_positions is not None:
        seen = torch.tensor(next_positions, device=position_ids.device)[:, None] - 1
        before = position_ids if token_mask is None else position_ids.masked_fill(~token_mask, -1)
        highest = torch.cat([seen, before], dim=1).cummax(dim=1).values[:, :-1]
        wrong = outside | (position_ids <= highest)
    if token_mask is not None:
        wrong = wrong & token_mask
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        position = int(position_ids[row, column])
        if outside[row, column]:
            raise ValueError(OUTSIDE.format(row=row, column=column, position=position))
        raise ValueError(PACKED.format(row=row, column=column, position=position, highest=int(highest[row, column])))
    return position_ids


def expand_positions(position_ids: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Integers [1 or batch, length] as int64 [batch, length], whatever their values."""
    rows, positions = shape
    check_tensor("position_ids", position_ids)
    if position_ids.dtype not in INDICES:
        raise ValueError(f"`position_ids` must be integers (int64 or int32), got {position_ids.dtype}.")
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows) or position_ids.shape[1] != positions:
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}; it must be [batch, length] = {shape}, or one row."
        )
    return position_ids.expand(rows, positions).long()


def check_cache(cache: Any, kind: type, rows: int | None, config, besides: str = "") -> None:
    """Check that a learned context is one of this model's, of a kind and with `rows` rows (None: any number).

    Args:
        besides: a further remedy for a cache of another kind.

    Raises:
        TypeError: it is of another kind.
        ValueError: it holds another number of rows, or what another configuration has read.
    """
    if cache is None:
        return
    if not isinstance(cache, kind):
        raise TypeError(
            f"`cache` is a {type(cache).__name__}; this model needs a {kind.__name__}, because it also has to keep "
            f"what was learned. Make one with {kind.__name__}(model.config), or leave it to generate().{besides}"
        )
    if rows is not None and cache.is_initialized and cache.batch_size != rows:
        raise ValueError(
            f"`cache` holds {cache.batch_size} rows but the inputs have {rows}: use `batch_repeat_interleave` or "
            "`batch_select_indices` on the cache."
        )
    if cache.config is not config and cache.config.context_settings() != config.context_settings():
        raise ValueError("`cache` belongs to a model of another configuration: read the text with this one.")


def check_tensor(name: str, value: Any) -> None:
    """Raises TypeError for what is no tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got a {type(value).__name__}: {shown(value)}.")


def check_flags(**flags: bool | None) -> None:
    """Switches are True, False, or None for the default; a text would count as True."""
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True, False or None, got {shown(value)}.")


def check_number_of_items(items: int | float | torch.Tensor | None) -> None:
    """What a summed loss is divided by: one positive number, or None."""
    if items is None or (isinstance(items, torch.Tensor) and is_asynchronous(items)):
        return
    value = items.item() if isinstance(items, torch.Tensor) and items.numel() == 1 else items
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`num_items_in_batch` must be a number or a tensor of one, got {shown(items)}.")
    if not 0 < value < math.inf:
        raise ValueError(
            f"`num_items_in_batch` is {value}, and the summed loss is divided by it: give the positive number of "
            "labelled tokens, or leave it out."
        )


def check_learning_span(span: tuple[int, int] | None) -> None:
    """Positions (first, end), two integers with 0 <= first <= end."""
    if span is None:
        return
    if not isinstance(span, tuple | list) or len(span) != 2 or not all(_is_integer(bound) for bound in span):
        raise TypeError(f"`learning_span` must be two integers (first, end), got {shown(span)}.")
    if not 0 <= span[0] <= span[1]:
        raise ValueError(
            f"`learning_span` is {tuple(span)}; it must be positions (first, end) with 0 <= first <= end. (0, 0) "
            "learns from none of them."
        )


def check_logits_to_keep(keep: int | torch.Tensor | None, length: int) -> None:
    """0 for all positions, how many of the last ones, or a tensor of positions of the call."""
    if isinstance(keep, torch.Tensor):
        if keep.dim() != 1 or keep.dtype not in INDICES:
            raise ValueError(
                f"`logits_to_keep` must be a number or integer positions [kept], got {keep.dtype} {tuple(keep.shape)}."
            )
        wrong = keep[(keep < -length) | (keep >= length)]
        if wrong.numel():
            raise ValueError(f"`logits_to_keep` holds the position {int(wrong[0])}, but the inputs have {length}.")
    elif keep is not None and not _is_integer(keep):
        raise TypeError(f"`logits_to_keep` must be an integer or a tensor of positions, got {shown(keep)}.")
    elif keep is not None and keep < 0:
        raise ValueError(f"`logits_to_keep` is {keep}: give 0 for all positions, or how many of the last ones.")


def selected_rows(indices: torch.Tensor, rows: int) -> list[int]:
    """The rows that a cache of `rows` rows is asked to keep, from their numbers or a bool for each.

    Raises:
        TypeError, ValueError: there is no such row, or none is asked for.
    """
    check_tensor("indices", indices)
    if indices.dim() != 1 or indices.dtype not in (*INDICES, torch.bool):
        raise ValueError(
            f"`indices` must be integers or bools of one dimension, got {indices.dtype} {tuple(indices.shape)}."
        )
    if indices.dtype == torch.bool and len(indices) != rows:
        raise ValueError(f"`indices` has {len(indices)} bools, but the cache holds {rows} rows: give one for each.")
    wanted = (indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices).tolist()
    wrong = [row for row in wanted if not 0 <= row < rows]
    if wrong or not wanted:
        what = f"holds {wrong[0]}" if wrong else "asks for no row"
        raise ValueError(f"`indices` {what}; the cache holds the rows 0 to {rows - 1}: name at least one of them.")
    return wanted


def asked_or(asked: bool | None, configured: bool | None) -> bool:
    """A switch as asked for, or as configured where it is None."""
    return bool(configured if asked is None else asked)


def check_last_is_token(mask: torch.Tensor | None) -> None:
    """Nothing is generated behind padding."""
    if mask is not None and mask.dim() == 2 and bool((mask[:, -1] == 0).any()):
        raise ValueError(
            "The prompt is padded on the right, so the model would continue from padding: tokenise with "
            "`padding_side='left'`."
        )


def check_repeats(repeats: int) -> None:
    """How often every row of a cache is repeated."""
    if not _is_integer(repeats):
        raise TypeError(f"`repeats` must be an integer, got {shown(repeats)}.")
    if repeats < 1:
        raise ValueError(f"`repeats` is {repeats}: give at least 1.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value as a message shows it: cut short, because it may be long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


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


def is_reentrant(checkpoint: Callable | None) -> bool:
    """Whether a function which checkpoints blocks was made with `use_reentrant=True`."""
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant"))


def check_not_reentrant(checkpoint: Callable | None) -> None:
    """Check that a function which checkpoints blocks lets the inner gradient pass through them.

    Raises:
        ValueError: it was made with `use_reentrant=True`.
    """
    if is_reentrant(checkpoint):
        raise ValueError(
            "`use_reentrant=True` cannot checkpoint this model while it learns: the inner gradient needs a graph that "
            "reentrant checkpointing hides. Use `use_reentrant=False`, or `test_time_training=False`."
        )


def check_label_arguments(
    labels: torch.Tensor | None, shift_labels: torch.Tensor | None, shape: tuple[int, int], vocab_size: int
) -> None:
    """Both kinds of labels of a language model, each of the inputs' shape, and in agreement where both are given."""
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is not None:
            check_labels(given, shape, vocab_size, name)
    if labels is not None and shift_labels is not None:
        check_same_labels(labels, shift_labels)
