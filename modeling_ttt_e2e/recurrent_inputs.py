"""Padding for recurrent states, and what they cannot read, refused with an error that says what to do instead."""

import torch
from transformers import Cache
from transformers.masking_utils import create_recurrent_attention_mask


def create_recurrent_mask(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **arguments
) -> torch.Tensor | None:
    """The mask of a call's own columns, [batch, length], 0 for padding; None where nothing is padded.

    Transformers' function takes the column of a call with a single one for a token; here it may be padding.
    """
    if attention_mask is not None and attention_mask.ndim == 2 and inputs_embeds.shape[1] == 1:
        return attention_mask[:, -1:]
    return create_recurrent_attention_mask(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **arguments)


def check_cache(cache: Cache | None, layer_types: list[str]) -> None:
    """Refuse a cache that was not made for these blocks.

    Raises:
        ValueError: its recurrent states stand elsewhere than the recurrent blocks.
    """
    if cache is not None and list(cache.is_linear) != [name == "linear_attention" for name in layer_types]:
        raise ValueError(
            f"`cache` ({type(cache).__name__}) has no recurrent states where the model has recurrent blocks: "
            "make it with `DynamicCache(config=model.config)`, or pass None."
        )


def check_padding(attention_mask: torch.Tensor | dict | None) -> None:
    """Refuse padding between tokens: a recurrent state, unlike attention, cannot skip it.

    Args:
        attention_mask: [batch, columns], 0 for padding; masks in another form are not looked at.

    Raises:
        ValueError: in some row a token comes after padding that comes after a token.
    """
    if not (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2):
        return
    real = attention_mask.bool()
    starts = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
    if (starts > 1).any():
        row = int(starts.argmax())
        raise ValueError(
            f"`attention_mask` has padding between the tokens of row {row}, which the recurrent state cannot skip: "
            "pad on the left, also when continuing from a cache."
        )


def check_positions(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | dict | None) -> None:
    """Refuse packed documents: the recurrent state would leak from one into the next.

    Args:
        position_ids: [1 or batch, length], or None.
        attention_mask: as in `check_padding`; the positions of padding do not matter.

    Raises:
        ValueError: positions go back inside a row.
    """
    if position_ids is None:
        return
    back = position_ids[:, 1:] < position_ids[:, :-1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        real = attention_mask[:, -position_ids.shape[1] :].bool()
        back = back & real[:, 1:] & real[:, :-1]
    if back.any():
        raise ValueError(
            "`position_ids` start again inside a row, so that several documents are packed into it and the recurrent "
            "state would leak between them: give each document a row, or pass `seq_idx` and `cu_seq_lens_q` (which "
            "needs the fused kernels)."
        )
