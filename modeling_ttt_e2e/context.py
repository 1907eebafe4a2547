"""The learned context: everything that reading leaves behind, as one immutable value.

    learned context = fast weights + the window of keys and values + the pending tokens

Reading maps a context and new tokens to a new context; nothing that is in one is ever overwritten, so copies are free.

Row-wise layout: keys and values end with the row's newest token (aligned right; rows that have read less have unused
places on the left). Pending tokens start with the mini-batch (aligned left; unused places on the right).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from .fast_weights import FastWeights
from .layers import NewStates
from .sinks import KeysValues, Past, join_pairs, with_new_sinks


@dataclass(frozen=True)
class Pending:
    """The mini-batch that is not learned yet, because its last target has not been read.

    Attributes:
        counts: tokens per row, at most `mini_batch_size`.
        inputs: [rows, max(counts), hidden_size], the hidden states that enter the inner loop.
        ids: [rows, max(counts)].
        positions: [rows, max(counts)], for RoPE.
    """

    counts: tuple[int, ...]
    inputs: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class LearnedContext:
    """What a batch of sequences has read and learned.

    Attributes:
        tokens: tokens read, per row.
        next_positions: position id of the next token, per row.
        past_key_values: per block, keys and values [rows, key/value heads, kept tokens, head_dim], or None.
        fast: fast weights, or None before the first inner step.
        pending: the unfinished mini-batch, or None when no token waits.
    """

    tokens: tuple[int, ...]
    next_positions: tuple[int, ...]
    past_key_values: tuple[Past | None, ...]
    fast: FastWeights | None = None
    pending: Pending | None = None

    @classmethod
    def start(cls, rows: int, num_layers: int) -> "LearnedContext":
        return cls(tokens=(0,) * rows, next_positions=(0,) * rows, past_key_values=(None,) * num_layers)

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def pending_counts(self) -> tuple[int, ...]:
        return self.pending.counts if self.pending is not None else (0,) * self.rows

    def select(self, indices: Sequence[int]) -> "LearnedContext":
        """The rows `indices`, in that order, repeats allowed. Fast weights are shared, not copied."""
        index = torch.tensor(list(indices), dtype=torch.long)

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.index_select(0, index.to(tensor.device))

        def pick_counts(counts: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(counts[i] for i in indices)

        pending = self.pending
        if pending is not None:
            tensors = (pick(tensor) for tensor in (pending.inputs, pending.ids, pending.positions))
            pending = Pending(pick_counts(pending.counts), *tensors)
        return LearnedContext(
            tokens=pick_counts(self.tokens),
            next_positions=pick_counts(self.next_positions),
            past_key_values=tuple(past and past.map(pick) for past in self.past_key_values),
            fast=None if self.fast is None else self.fast.select(indices),
            pending=pending,
        )

    @classmethod
    def joined(cls, contexts: Sequence["LearnedContext"]) -> "LearnedContext":
        """The rows of several contexts, which have read something, one after the other. Copies everything."""
        layers = zip(*(context.past_key_values for context in contexts), strict=True)
        return cls(
            tokens=sum((context.tokens for context in contexts), ()),
            next_positions=sum((context.next_positions for context in contexts), ()),
            past_key_values=tuple(map(_joined_rows, layers)),
            fast=_joined_fast_weights(contexts),
            pending=_joined_pending(contexts),
        )

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        found = [states for past in self.past_key_values for pair in past or () for states in pair or ()]
        found += () if self.fast is None else self.fast.tensors
        pending = self.pending
        return found if pending is None else [*found, pending.inputs, pending.ids, pending.positions]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LearnedContext":
        """With a function applied to every tensor."""
        fast, pending = self.fast, self.pending
        if fast is not None:
            fast = replace(fast, tensors=tuple(map(function, fast.tensors)))
        if pending is not None:
            pending = Pending(pending.counts, *map(function, (pending.inputs, pending.ids, pending.positions)))
        past_key_values = tuple(past and past.map(function) for past in self.past_key_values)
        return replace(self, fast=fast, pending=pending, past_key_values=past_key_values)


def _joined_rows(layer: Sequence[Past | None]) -> Past | None:
    """What one block remembers of the rows of several contexts; windows are aligned right."""
    present = [past for past in layer if past is not None]
    if not present:
        return None
    longest = max(past.length for past in present)
    windows = zip(*(past.window for past in present if past.window is not None), strict=True)
    keys, values = (torch.cat([F.pad(own, [0, 0, longest - own.shape[2], 0]) for own in states]) for states in windows)
    sinks = [past.sinks for past in present if past.sinks is not None]
    joined = (torch.cat([own[0] for own in sinks]), torch.cat([own[1] for own in sinks])) if sinks else None
    return Past((keys, values), joined)


def _joined_fast_weights(contexts: Sequence["LearnedContext"]) -> FastWeights | None:
    """One copy per row; zeros where nothing was learned."""
    own = [None if context.fast is None else context.fast.own_copies().tensors for context in contexts]
    model = next((tensors for tensors in own if tensors is not None), None)
    if model is None:
        return None
    filled = [
        tuple(like.new_zeros(context.rows, *like.shape[1:]) for like in model) if tensors is None else tensors
        for context, tensors in zip(contexts, own, strict=True)
    ]
    return FastWeights(tuple(map(torch.cat, zip(*filled, strict=True))))


def _joined_pending(contexts: Sequence["LearnedContext"]) -> Pending | None:
    """Aligned left; a row that waits for nothing holds zeros."""
    model = next((context.pending for context in contexts if context.pending is not None), None)
    if model is None:
        return None
    counts = sum((context.pending_counts for context in contexts), ())
    longest = max(counts)

    def rows(name: str) -> torch.Tensor:
        like, found = getattr(model, name), []
        for context in contexts:
            own = like.new_zeros(context.rows, 0, *like.shape[2:])
            if context.pending is not None:
                own = getattr(context.pending, name)[:, :longest]
            found.append(F.pad(own, [0, 0] * (like.dim() - 2) + [0, longest - own.shape[1]]))
        return torch.cat(found)

    return Pending(counts, rows("inputs"), rows("ids"), rows("positions"))


def keep_visible(
    past: Past | None,
    states: NewStates,
    tokens_read: Sequence[int],
    counts: Sequence[int],
    window: int | None,
    num_sinks: int,
) -> Past:
    """Earlier keys and values with new ones, as far as they will be seen.

    Args:
        states: what attention has left behind them.
        tokens_read: per row, tokens before the new ones.
        counts: per row, new tokens.
        window: of the last ones how many are kept; None: all.
        num_sinks: of the first ones how many are kept besides.
    """
    past = past or Past(None)
    joined = states.joined or join_pairs((past.window, states.new))
    kept = last_tokens(joined, [past.length + count for count in counts], window)
    sinks = with_new_sinks(past.sinks, states.new, tokens_read, num_sinks) if num_sinks else None
    return Past(kept, sinks)


def last_tokens(pair: KeysValues, ends: Sequence[int], length: int | None) -> KeysValues:
    """`take_last` of keys and values (None: all)."""
    length = max(ends) if length is None else length
    return take_last(pair[0], ends, length), take_last(pair[1], ends, length)


def take_last(states: torch.Tensor, ends: Sequence[int], length: int) -> torch.Tensor:
    """The `length` positions before position `ends[row]` of each row, aligned right.

    Args:
        states: [rows, heads, positions, channels].
        ends: one past the last wanted position, per row.

    Returns:
        [rows, heads, min(length, max(ends)), channels]; positions that a row lacks hold copies of its first position.
    """
    length = min(length, max(ends))
    if min(ends) == max(ends):
        return states[:, :, ends[0] - length : ends[0]]
    index = torch.tensor(ends)[:, None] - length + torch.arange(length)  # [rows, length]
    return gather_positions(states, index.clamp_min(0), dim=2)


def gather_positions(tensor: torch.Tensor, index: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Per row, the positions `index` [rows, n] of axis `dim` (every axis between the rows and it is kept whole)."""
    index = index.to(tensor.device)
    shape = [index.shape[0]] + [1] * (tensor.dim() - 1)
    shape[dim] = index.shape[1]
    return torch.take_along_dim(tensor, index.view(shape), dim=dim)
