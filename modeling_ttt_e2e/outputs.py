"""From the tokens of segments back to the positions of a call: hidden states, losses and attention weights.

Axis letters: B batch rows, N positions of the call, n tokens of a segment.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from .tokens import Segment, Tokens


class PositionWriter:
    """Collects outputs of tokens and returns them at positions `first` to N - 1, zeros where no token was read."""

    def __init__(self, tokens: Tokens, first: int = 0):
        self.tokens, self.first = tokens, first
        # Values [B, n, ...] with their first position where each row's tokens stand in consecutive ones, else values
        # [m, ...] with the row and position [m, 2] of each.
        self.parts: list[tuple[torch.Tensor, int | torch.Tensor]] = []
        self.sources: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, values: torch.Tensor, segment: Segment, start: int = 0) -> None:
        """values [B, n, ...] of the segment's tokens `start`, `start` + 1, ..."""
        if self.tokens.token_mask is None and len(set(segment.begin)) == 1 and min(segment.counts) == segment.length:
            # Only what is asked for is kept: a long text may want nothing but its last position.
            position = segment.begin[0] + start
            skipped = min(max(self.first - position, 0), values.shape[1])
            if skipped:
                values = values[:, skipped:] if values.requires_grad else values[:, skipped:].clone()
            if values.shape[1]:
                self.parts.append((values, position + skipped))
            return
        positions, token_mask = self._places(segment, start, values.shape[1])
        rows, own = (token_mask & (positions >= self.first)).nonzero(as_tuple=True)
        places = torch.stack([rows, positions[rows, own]], dim=1).to(values.device)
        self.parts.append((values[places[:, 0], own.to(values.device)], places))

    def add_chunks(self, chunks: Sequence[torch.Tensor], segment: Segment) -> None:
        """Consecutive chunks [B, n, ...] of a segment's tokens, which `followed` follows back.

        Slots behind the last token are left out.
        """
        start = 0
        for chunk in chunks:
            width = min(chunk.shape[1], segment.length - start)
            if width > 0:
                self.sources.append((chunk, *self._places(segment, start, width)))
                self.add(chunk if width == chunk.shape[1] else chunk[:, :width], segment, start)
            start += chunk.shape[1]

    def result(self) -> torch.Tensor:
        """[B, N - first, ...]"""
        length = self.tokens.length - self.first
        if all(isinstance(places, int) for _, places in self.parts):
            values = torch.cat([values for values, _ in self.parts], dim=1)
            missing = length - values.shape[1]
            return F.pad(values, [0, 0] * (values.dim() - 2) + [0, missing]) if missing else values
        flat, places = (torch.cat(parts) for parts in zip(*map(_flat, self.parts), strict=True))
        result = flat.new_zeros(self.tokens.rows, length, *flat.shape[1:])
        return result.index_put((places[:, 0], places[:, 1] - self.first), flat)

    def followed(self) -> torch.Tensor:
        """As `result`, with the gradient of the chunks: `retain_grad()` shows what flows through the model itself.

        Where all positions are one chunk it is returned itself. Elsewhere the result is a copy, from which nothing in
        the model is computed; then hooks on the chunks bring it their gradient.
        """
        (first, *_), *others = self.sources
        if not others and isinstance(self.parts[0][1], int) and first.shape[1] == self.tokens.length - self.first:
            return first
        result = self.result()
        for chunk, positions, token_mask in self.sources:
            _follow_gradient(result, chunk, partial(_to_positions, positions=positions, token_mask=token_mask))
        return result

    def _places(self, segment: Segment, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The position of each token from `start` on, and whether there is one, both [B, length] on the CPU."""
        positions = self.tokens.places([begin + start for begin in segment.begin], length)
        token_mask = torch.arange(start, start + length) < torch.tensor(segment.counts)[:, None]
        return positions.expand_as(token_mask), token_mask


def _flat(part: tuple[torch.Tensor, int | torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [m, ...] of tokens, and the row and position [m, 2] of each."""
    values, places = part
    if isinstance(places, torch.Tensor):
        return values, places
    rows, positions = (torch.arange(size, device=values.device) for size in values.shape[:2])
    return values.flatten(0, 1), torch.cartesian_prod(rows, positions + places)


def _to_positions(
    state: torch.Tensor, gradient: torch.Tensor, positions: torch.Tensor, token_mask: torch.Tensor
) -> None:
    """Write the gradient of the tokens at `positions` into that of the whole state."""
    rows, own = token_mask.nonzero(as_tuple=True)
    positions, rows, own = (index.to(state.device) for index in (positions[rows, own], rows, own))
    state[rows, positions] = gradient[rows, own]


def _follow_gradient(
    state: torch.Tensor, source: torch.Tensor, write: Callable[[torch.Tensor, torch.Tensor], None]
) -> None:
    """Let `state.retain_grad()` show the gradient of `source`, of which it is a copy in another order.

    Args:
        write: `write(gradient of state, gradient of source)` puts the latter in its place.
    """
    if not source.requires_grad:
        return
    copy = weakref.ref(state)  # which may go before the graph does

    def follow(gradient: torch.Tensor) -> None:
        own = copy()
        if own is None or not own.retains_grad:
            return
        if own.grad is None:
            own.grad = torch.zeros_like(own)
        with torch.no_grad():
            write(own.grad, gradient)

    source.register_hook(follow)


def _past_positions(
    attention_mask: torch.Tensor | None, positions_read: int, tokens: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    """Per row, the positions of the tokens that earlier calls have read, in order.

    A mask over all positions tells them; without one, padding is taken to stand on the left.
    """
    places = [torch.arange(positions_read - count, positions_read, device=device) for count in tokens]
    if attention_mask is None or attention_mask.shape[1] <= positions_read or positions_read == 0:
        return places
    masked = [row.nonzero().squeeze(1).to(device) for row in attention_mask[:, :positions_read]]
    return [own if len(own) == len(place) else place for own, place in zip(masked, places, strict=True)]


class AttentionWriter:
    """Collects one block's attention weights and returns them over the positions of a call.

    Args:
        num_sinks: attention sinks, whose weights when they have left the window stand before all others.
        num_past: key positions from before the call, the last ones that were read.
        positions_read: positions from before the call.
        past_positions: per row, those of its tokens from before the call; those beyond `num_past` are left out.
        positions_of_rows: per row, those of its tokens in the call, in order.
        length: N, positions of the call.
    """

    def __init__(
        self,
        num_sinks: int,
        num_past: int,
        positions_read: int,
        past_positions: Sequence[torch.Tensor],
        positions_of_rows: Sequence[torch.Tensor],
        length: int,
    ):
        self.num_sinks, self.num_past = num_sinks, num_past
        # The place of every token of a row among the keys, those from before the call first; negative: left out.
        shifted = zip(past_positions, positions_of_rows, strict=True)
        self.key_places = [torch.cat([old - positions_read, new]) + num_past for old, new in shifted]
        self.past_tokens = [len(own) for own in past_positions]
        self.positions_of_rows = positions_of_rows
        self.length = length
        self.parts = []

    def add(self, weights: torch.Tensor, segment: Segment, start: int = 0) -> None:
        """weights [B, heads, Q, K] of the segment's tokens `start`, `start` + 1, ..."""
        self.parts.append((weights, segment, start))

    def result(self) -> torch.Tensor:
        """[B, heads, N, num_sinks + num_past + N]; zero where a query or key is padding."""
        weights, segment, start = self.parts[0]
        size = (*weights.shape[:2], self.length, self.num_sinks + self.num_past + self.length)
        alone = len(self.parts) == 1 and weights.shape == size
        if alone and not self.num_past and not start and min(segment.counts) == self.length:
            return weights
        result = weights.new_zeros(size)
        of_sinks, others = result[..., : self.num_sinks], result[..., self.num_sinks :]
        for weights, segment, start in self.parts:
            at_sinks, weights = weights[..., : self.num_sinks], weights[..., self.num_sinks :]
            for row, (begin, end) in enumerate(zip(segment.begin, segment.end, strict=True)):
                if begin == end:
                    continue
                first = begin + start
                places, earlier = self.positions_of_rows[row], self.past_tokens[row]
                queries = torch.arange(weights.shape[2], device=weights.device) + first
                keys = torch.arange(weights.shape[3], device=weights.device) + earlier + first
                keys = keys - (weights.shape[3] - weights.shape[2])
                good_queries = queries < end
                key_positions = self.key_places[row][keys.clamp(0, len(self.key_places[row]) - 1)]
                good_keys = (keys >= 0) & (keys < earlier + end) & (key_positions >= 0)
                block = weights[row][:, good_queries][:, :, good_keys]
                written = places[queries[good_queries]]
                others[row][:, written[:, None], key_positions[good_keys][None, :]] = block
                of_sinks[row][:, written] = at_sinks[row][:, good_queries]
        return result


def attention_writers(
    config, tokens: Tokens, attention_mask: torch.Tensor | None, tokens_before: Sequence[int], positions_read: int
) -> dict[int, AttentionWriter]:
    """Collectors of attention weights by the index of their block, for blocks with attention.

    Args:
        attention_mask: as the call was given it.
        tokens_before, positions_read: what earlier calls have read.
    """
    every = torch.arange(tokens.length, device=tokens.device)
    places = [every if tokens.token_mask is None else every[tokens.token_mask[row]] for row in range(tokens.rows)]
    past = _past_positions(attention_mask, positions_read, tokens_before, tokens.device)
    kept = {
        "full_attention": (0, positions_read),
        "sliding_attention": (config.num_sink_tokens, min(positions_read, (config.sliding_window or 1) - 1)),
    }
    return {
        index: AttentionWriter(*kept[kind], positions_read, past, places, tokens.length)
        for index, kind in enumerate(config.layer_types)
        if kind in kept
    }
