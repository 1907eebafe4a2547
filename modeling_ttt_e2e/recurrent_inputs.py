"""What a recurrent mixer reads of a padded batch, and inputs that it cannot read, refused with what to do instead.

A mixer of transformers sets padding to zero and lets it run through its convolution and its state. That changes nothing
before a row's first token; anywhere else a state would fade and a convolution would see a gap. There each row's tokens
are read without their padding, together with those of rows that have as many.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.masking_utils import create_recurrent_attention_mask


@dataclass(frozen=True)
class TokenGroup:
    """The tokens of rows that have equally many in a call: the rows [rows, 1], and positions [rows, tokens]."""

    rows: torch.Tensor
    positions: torch.Tensor


RecurrentMask = torch.Tensor | list[TokenGroup] | None


def create_recurrent_mask(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **arguments
) -> torch.Tensor | None:
    """The mask of a call's own positions, [batch, length], 0 for padding; None where nothing is padded.

    Transformers' function takes the one position of a call of length 1 for a token; here it may be padding.
    """
    if attention_mask is not None and attention_mask.ndim == 2 and inputs_embeds.shape[1] == 1:
        return attention_mask[:, -1:]
    return create_recurrent_attention_mask(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **arguments)


def group_tokens(mask: torch.Tensor | None, cache: Cache | None) -> RecurrentMask:
    """The mask itself where setting padding to zero is enough, otherwise the tokens of each row.

    Args:
        mask: [batch, length] of the call's own positions, 0 for padding; None where nothing is padded.
        cache: what was read before, or will be read on from.
    """
    if mask is None:
        return None
    token_mask = mask.bool()
    if bool(token_mask.all()):
        return None
    after_a_token = token_mask.long().cumsum(dim=1) > 0
    if cache is None:
        # What follows a row's last token changes no output of a token.
        before_a_token = token_mask.flip(1).long().cumsum(dim=1).flip(1) > 0
        in_the_way = ~token_mask & after_a_token & before_a_token
    else:
        in_the_way = ~token_mask if cache.has_previous_state() else ~token_mask & after_a_token
    if not bool(in_the_way.any()):
        return mask
    counts = token_mask.sum(dim=1)
    groups = []
    for count in sorted(set(counts.tolist()) - {0}):
        rows = (counts == count).nonzero()
        positions = token_mask[rows[:, 0]].nonzero()[:, 1].view(-1, count)
        groups.append(TokenGroup(rows, positions))
    return groups


def mix_tokens(
    mixer: nn.Module, hidden_states: torch.Tensor, cache: Cache | None, mask: RecurrentMask, **kwargs
) -> torch.Tensor:
    """A recurrent mixer's output [batch, length, hidden_size]; zero at padding where `mask` holds groups of tokens."""
    if not isinstance(mask, list):
        return mixer(hidden_states, cache=cache, attention_mask=mask, **kwargs)
    mixed = torch.zeros_like(hidden_states)
    for group in mask:
        own = None if cache is None else _rows_of(cache, mixer.layer_idx, group.rows[:, 0])
        where = (group.rows, group.positions)
        read = mixer(hidden_states[where], cache=own, attention_mask=None, **kwargs)
        mixed = mixed.index_put(where, read)
        if cache is not None:
            _write_back(cache.layers[mixer.layer_idx], own.layers[mixer.layer_idx], group.rows[:, 0], len(mixed))
    return mixed


def _rows_of(cache: Cache, index: int, rows: torch.Tensor) -> Cache:
    """A cache whose block `index` holds copies of the states of some rows."""
    own, layer = copy.copy(cache), copy.copy(cache.layers[index])
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # one entry for each of the block's states
            setattr(layer, name, dict(value))
    layer.reorder_cache(rows)  # type: ignore[arg-type]  # any tensor of indices
    own.layers = [*cache.layers[:index], layer, *cache.layers[index + 1 :]]
    return own


def _write_back(
    layer: LinearAttentionCacheLayerMixin, own: LinearAttentionCacheLayerMixin, rows: torch.Tensor, batch: int
) -> None:
    """Take over the states of some rows; a row that has read nothing has states of zeros."""
    for name, value in vars(own).items():
        if name not in ("conv_states", "recurrent_states"):
            setattr(layer, name, value)
            continue
        states = getattr(layer, name)
        for index, new in value.items():
            if new is not None:
                old = new.new_zeros(batch, *new.shape[1:]) if states[index] is None else states[index]
                states[index] = old.index_copy(0, rows, new)


def count_positions(
    attention_mask: torch.Tensor | dict | None, positions_read: int, length: int
) -> torch.Tensor | None:
    """Position ids [batch, length] that count each row's tokens; None where no mask says which positions hold them."""
    if not (isinstance(attention_mask, torch.Tensor) and attention_mask.shape[1:] == (positions_read + length,)):
        return None
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -length:]


def check_states(cache: Cache | None, layer_types: list[str]) -> None:
    """Refuse a cache that was not made for these blocks.

    Raises:
        TypeError: it is no cache of transformers.
        ValueError: its recurrent states stand elsewhere than the recurrent blocks.
    """
    if cache is None:
        return
    remedy = "make it with `DynamicCache(config=model.config)`, or pass None."
    if not isinstance(cache, Cache):
        raise TypeError(f"`cache` is a {type(cache).__name__}: {remedy}")
    recurrent = [name == "linear_attention" for name in layer_types]
    if any(recurrent) and list(cache.is_linear) != recurrent:
        raise ValueError(
            f"`cache` ({type(cache).__name__}) has no recurrent states where the model has recurrent blocks: {remedy}"
        )


def check_one_document(position_ids: torch.Tensor, token_mask: torch.Tensor | None) -> None:
    """Refuse packed documents: the recurrent state would leak from one into the next.

    Args:
        position_ids: [1 or batch, length].
        token_mask: [batch, length] bool, False at padding, whose positions do not matter; None when nothing is padded.

    Raises:
        ValueError: positions go back inside a row.
    """
    back = position_ids[:, 1:] < position_ids[:, :-1]
    if token_mask is not None:
        back = back & token_mask[:, 1:] & token_mask[:, :-1]
    if back.any():
        raise ValueError(
            "`position_ids` start again inside a row, so that several documents are packed into it and the recurrent "
            "state would leak between them: give each document a row (set packing=False and padding_free=False in a "
            "trainer's arguments), or pass `seq_idx` and `cu_seq_lens_q` (which needs the fused kernels)."
        )


def check_packing(groups: bool, arguments: dict) -> None:
    """Refuse packed documents in a row with padding that has to be left out.

    Raises:
        ValueError: `arguments` describe packed documents and tokens are read in groups.
    """
    if groups and arguments:
        raise ValueError(
            f"{sorted(arguments)} describe packed documents, and `attention_mask` has padding between or after them: "
            "pack documents without padding."
        )
