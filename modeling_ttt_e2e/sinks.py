"""Attention sinks: the first tokens of a sequence, which sliding layers never stop seeing (arXiv 2309.17453).

    keys of a sliding layer = [sinks | window before | new tokens],     values alike

Token n sees sink j in the first part when the window (the last W tokens, n included) has left it behind, n - j >= W;
before that it sees it in the window, so that no token sees it twice. The distance of a sink stops growing where the
last of the S sinks leaves the window, because a model cannot use distances for which it was not trained:

    distance of sink j from token n = min(n, W + S - 1) - j

Axis letters: B batch rows, H heads, Q queries, K keys, S sinks, C channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import repeat_kv

from .growing import grown
from .twice_differentiable import at_least_float32, autocast_type, masked_softmax

KeysValues = tuple[torch.Tensor, torch.Tensor]
CHANNELS_MULTIPLE = 8  # channels of a head, for fast kernels
FEW_QUERIES = 8  # so many are attended to without copying the keys


class Past(NamedTuple):
    """What the attention of a block remembers, keys and values [B, H, tokens, C].

    Attributes:
        window: of the last tokens, aligned right; None where there are none.
        sinks: of the first S tokens, which are in the window too while it reaches them; None in a block without sinks.
    """

    window: KeysValues | None
    sinks: KeysValues | None = None

    @classmethod
    def of_joined(cls, pair: KeysValues, num_sinks: int) -> "Past":
        """From what `joined` gives."""
        sinks = (pair[0][:, :, :num_sinks], pair[1][:, :, :num_sinks]) if num_sinks else None
        return cls((pair[0][:, :, num_sinks:], pair[1][:, :, num_sinks:]), sinks)

    @property
    def length(self) -> int:
        """Tokens in the window."""
        return 0 if self.window is None else self.window[0].shape[2]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Past":
        """With a function applied to every tensor."""
        return Past(*(pair and (function(pair[0]), function(pair[1])) for pair in self))

    def joined(self) -> KeysValues:
        """The sinks, and the window behind them."""
        return join_pairs((self.sinks, self.window))


@dataclass(frozen=True)
class Sinks:
    """How the new tokens of a call see the sinks.

    Attributes:
        count: S.
        tokens_read: per row, tokens before the new ones.
        position_embeddings: cosines and sines of the RoPE angles with which the new tokens' queries meet the sinks,
            each [1 or B, 1, Q, C].
    """

    count: int
    tokens_read: tuple[int, ...]
    position_embeddings: KeysValues


def sinks_left_behind(count: int, window: int | None, tokens_read: Sequence[int], num_new: int) -> bool:
    """Whether a sink is outside of the window of some of `num_new` new tokens."""
    return window is not None and count > 0 and max(tokens_read) + num_new - 1 >= window


def positions_at_sinks(positions: torch.Tensor, tokens_read: Sequence[int], window: int, count: int) -> torch.Tensor:
    """Position ids [1 or B, Q] from which the new tokens see the sinks.

    Args:
        positions: their own, [1 or B, Q].
        tokens_read: per row, tokens before the new ones.
    """
    read = tokens_read[:1] if min(tokens_read) == max(tokens_read) else tokens_read
    places = torch.arange(positions.shape[1], device=positions.device)
    tokens = torch.tensor(read, device=positions.device)[:, None] + places
    return positions - (tokens - (window + count - 1)).clamp_min(0)


def sink_mask_function(tokens_read: torch.Tensor, window: int, num_past: int, count: int) -> Callable:
    """Which sinks a query sees outside of its window, as a mask function of transformers.

    Args:
        tokens_read: [B], or [1] for all rows.
        num_past: keys between the sinks and the new tokens. Queries are counted as the new keys are.
    """

    def seen(batch_idx, head_idx, q_idx, kv_idx):
        token = tokens_read[batch_idx] + q_idx - count - num_past
        return (kv_idx < count) & (token - kv_idx >= window)

    return seen


def join_pairs(pairs: Sequence[KeysValues | None]) -> KeysValues:
    """Keys and values one after the other."""
    present = [pair for pair in pairs if pair is not None]
    if len(present) == 1:
        return present[0]
    return torch.cat([keys for keys, _ in present], dim=2), torch.cat([values for _, values in present], dim=2)


def grown_pair(past: KeysValues | None, new: KeysValues) -> KeysValues:
    """Earlier keys and values with the new ones behind them."""
    return new if past is None else (grown(past[0], new[0]), grown(past[1], new[1]))


def with_new_sinks(stored: KeysValues | None, new: KeysValues, tokens_read: Sequence[int], count: int) -> KeysValues:
    """Keys and values of the sinks after new tokens, each [B, heads, S, C]; what a row has not read yet means nothing.

    Args:
        stored: those of the `tokens_read[row]` tokens before; None where no row has read any.
        new: of the new tokens, each [B, heads, T, C].
    """
    if stored is not None and min(tokens_read) >= count:
        return stored
    length = new[0].shape[2]
    if max(tokens_read) == 0 and length >= count:
        return new[0][:, :, :count], new[1][:, :, :count]
    places = torch.arange(count) - torch.tensor(tokens_read)[:, None]  # [B, S] among the new tokens
    places = places.to(new[0].device)[:, None, :, None]
    first = tuple(torch.take_along_dim(states, places.clamp(0, length - 1), dim=2) for states in new)
    if stored is None:
        return first[0], first[1]
    keys, values = (torch.where(places < 0, old.to(own.dtype), own) for old, own in zip(stored, first, strict=True))
    return keys, values


def are_few(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend_with_sinks` suits: for few queries, of one dtype with what they see."""
    return query.shape[2] <= FEW_QUERIES and query.dtype == value.dtype


def attend_with_sinks(
    query: torch.Tensor, at_sinks: torch.Tensor, sinks: KeysValues, others: KeysValues, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of few queries, written down: unlike `with_sink_channels` it copies no keys and no values.

    Scores are computed in at least float32 (in half precision from a copy of the keys), as fused attention does.

    Args:
        query, at_sinks, sinks: as `with_sink_channels` has them; others: keys and values of the other tokens.
        mask: bool, broadcast to [B, H, Q, S + K].

    Returns:
        [B, H, Q, C].
    """
    (batch, heads, queries, channels), count = query.shape, sinks[0].shape[2]
    # Query heads that share keys stand together as further queries.
    shared = (batch, sinks[0].shape[1], heads // sinks[0].shape[1] * queries)
    parts = ((at_sinks, sinks[0]), (query, others[0]))
    exact = at_least_float32(query.dtype)
    with torch.autocast(autocast_type(query.device), enabled=False):
        products = [own.reshape(*shared, channels).to(exact) @ keys.to(exact).mT for own, keys in parts]
    products = torch.cat(products, dim=-1)
    weights = masked_softmax(products.view(batch, heads, queries, -1), mask, scale).to(query.dtype)
    weights = weights.view(*shared, -1)
    output = weights[..., :count] @ sinks[1] + weights[..., count:] @ others[1]
    return output.view(query.shape)


def sink_channels(count: int, dtype: torch.dtype, head_dim: int) -> int:
    """Channels that `with_sink_channels` adds to heads of `head_dim` for `count` sinks."""
    extra = count if dtype.itemsize >= 4 else 2 * count
    return extra + -(head_dim + extra) % CHANNELS_MULTIPLE if count else 0


def with_sink_channels(
    query: torch.Tensor, at_sinks: torch.Tensor, sinks: KeysValues, others: Sequence[KeysValues]
) -> tuple[torch.Tensor, KeysValues, list[KeysValues]]:
    """Queries, keys and values whose scores at the sinks are those of `at_sinks`, for any implementation of attention.

        [q, a] [k, 0]^T = q k^T for other keys,     [q, a] [0, e_j]^T = a_j = q' k_j^T for sink j

    So every sink costs one channel, of zeros in the values; two in half precision, the second one for what rounding the
    first has lost.

    Args:
        query: [B, H, Q, C]; at_sinks: the same, rotated as the sinks see them (q').
        sinks: their keys and values [B, key/value heads, S, C]; others: pairs of other tokens.
    """
    groups, count = query.shape[1] // sinks[0].shape[1], sinks[0].shape[2]
    exact = at_sinks.dtype if at_sinks.dtype.itemsize >= 4 else torch.float32
    scores = at_sinks.to(exact) @ repeat_kv(sinks[0], groups).to(exact).transpose(2, 3)  # [B, H, Q, S]
    parts = [scores.to(query.dtype)]
    if exact != query.dtype:
        parts.append((scores - parts[0].to(exact)).to(query.dtype))
    extra = sink_channels(count, query.dtype, query.shape[-1])
    query = F.pad(torch.cat([query, *parts], dim=-1), [0, extra - count * len(parts)])
    units = torch.eye(count, dtype=sinks[0].dtype, device=query.device).repeat(1, len(parts))
    units = F.pad(units, [sinks[0].shape[-1], extra - count * len(parts)])  # [S, C + extra]
    keys = units.expand(*sinks[0].shape[:2], -1, -1)
    padded = [(F.pad(own_keys, [0, extra]), F.pad(values, [0, extra])) for own_keys, values in others]
    return query, (keys, F.pad(sinks[1], [0, extra])), padded
