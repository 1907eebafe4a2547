"""From the columns of a padded batch to the tokens of its rows, and back.

A call has columns, some of them padding; a row has tokens. Reading works on tokens: each row's own are moved to the
left, and the outputs are returned to their columns. So padding changes nothing, wherever it stands.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn import functional as F

from .context import LearnedContext, gather_columns
from .reader import Segment


@dataclass(frozen=True)
class Columns:
    """The input of a call, column by column.

    Attributes:
        ids: [B, N] or None; embeddings: [B, N, D] or None; position_ids: [B, N] or None for consecutive ones.
        real: [B, N] bool, False at padding; None when every column holds a token.
        labels: [B, N] what each column's output predicts, or None.
        last_needed: per row, one past the last column whose output anyone will use.
    """

    ids: torch.Tensor | None
    embeddings: torch.Tensor | None
    position_ids: torch.Tensor | None
    real: torch.Tensor | None
    labels: torch.Tensor | None
    last_needed: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        tensor = self.ids if self.ids is not None else self.embeddings
        return tensor.shape[0], tensor.shape[1]

    @property
    def device(self) -> torch.device:
        return (self.ids if self.ids is not None else self.embeddings).device


@dataclass(frozen=True)
class Placement:
    """Where the tokens of a segment stand: columns[row, token] for token < counts[row]."""

    columns: torch.Tensor
    counts: tuple[int, ...]
    consecutive: bool

    def part(self, start: int, length: int) -> "Placement":
        """Where tokens start to start + length - 1 of the segment stand."""
        counts = tuple(min(max(count - start, 0), length) for count in self.counts)
        return Placement(self.columns[:, start : start + length], counts, self.consecutive)


@dataclass(frozen=True)
class Piece:
    """Consecutive columns [start, end) that are read in one manner: learning on or off."""

    start: int
    end: int
    learning: bool


def split_by_learning(columns: int, seen: int, learning: bool, span: tuple[int, int] | None) -> list[Piece]:
    """Pieces of `columns` new columns after `seen` earlier ones, learning only within the columns of `span`."""
    if not learning or span is None:
        return [Piece(0, columns, learning)]
    start, end = (min(max(bound - seen, 0), columns) for bound in span)
    pieces = [Piece(0, start, False), Piece(start, end, True), Piece(end, columns, False)]
    return [piece for piece in pieces if piece.end > piece.start]


def segments(
    columns: Columns,
    piece: Piece,
    context: LearnedContext,
    size: int | None,
    mini_batch_size: int,
    keep_context: bool,
) -> Iterator[tuple[Segment, Placement]]:
    """Cut a piece into segments of at most `size` tokens (None: one segment).

    Where the pending mini-batch of a row is filled up and more follows, its rest is a segment of its own: then a
    mini-batch never mixes tokens of earlier calls, whose keys and values are constants, with those that follow, and no
    row depends on how far its neighbours have read.

    Args:
        context: before the piece.
        size: tokens per segment.
        keep_context: the learned context after the piece will be used.
    """
    where, known, counts = _tokens_of_piece(columns, piece)
    starts, longest = (0,) * len(counts), max(counts)
    if piece.learning:
        rest = _rest_of_mini_batches(context.pending_counts, counts, known, mini_batch_size)
        if any(rest):
            longest = max(count - own for count, own in zip(counts, rest, strict=True))
            more = keep_context or longest > 0
            # What follows is left to the next segment: the step of the mini-batch is taken there.
            yield _segment(columns, piece, context, _Cut(where, rest, starts, rest), max(rest), more)
            if longest == 0:
                return
            starts = rest
    # A piece of nothing but padding is read as well, one column of it, for the shapes of its outputs.
    longest = max(1, longest)
    step = longest if size is None else size
    for first in range(0, longest, step):
        begin = tuple(start + first for start in starts)
        width = min(step, longest - first)
        more = keep_context or first + width < longest
        yield _segment(columns, piece, context, _Cut(where, known, begin, counts), width, more)


@dataclass(frozen=True)
class _Cut:
    """Where a segment lies among the tokens of a piece.

    Attributes:
        where: [B, n], the column of each token; known: how many tokens each row has in the piece.
        begin, end: its tokens per row; it may be cut shorter.
    """

    where: torch.Tensor
    known: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]


def _rest_of_mini_batches(
    pending: Sequence[int], counts: Sequence[int], known: Sequence[int], size: int
) -> tuple[int, ...]:
    """Per row, the tokens that fill up its begun mini-batch; zeros when no row goes beyond the one that it is in."""
    rest = tuple(-waiting % size for waiting in pending)
    if all(tokens <= (left or size) for tokens, left in zip(known, rest, strict=True)):
        return (0,) * len(rest)
    return tuple(min(count, left) for count, left in zip(counts, rest, strict=True))


def _segment(
    columns: Columns, piece: Piece, context: LearnedContext, cut: _Cut, size: int, more: bool
) -> tuple[Segment, Placement]:
    """The segment of `size` tokens at a cut; `more`: the learned context after it will be used."""
    device = cut.where.device
    own = tuple(min(max(end - begin, 0), size) for begin, end in zip(cut.begin, cut.end, strict=True))
    first = cut.begin[0]
    aligned = min(cut.begin) == max(cut.begin) and first + size <= cut.where.shape[1]
    if aligned:
        where = cut.where[:, first : first + size]
    else:
        index = torch.tensor(cut.begin, device=device)[:, None] + torch.arange(size, device=device)
        where = cut.where.gather(1, index.clamp_max(cut.where.shape[1] - 1))
    consecutive = columns.real is None and aligned

    def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if consecutive:
            return tensor[:, piece.start + first : piece.start + first + size]
        return gather_columns(tensor, where)

    position_ids = pick(columns.position_ids)
    if position_ids is None:
        starts = [next_one + begin for next_one, begin in zip(context.next_positions, cut.begin, strict=True)]
        starts = starts[:1] if min(starts) == max(starts) else starts
        position_ids = torch.tensor(starts, device=device)[:, None] + torch.arange(size, device=device)
    segment = Segment(
        ids=pick(columns.ids),
        embeddings=pick(columns.embeddings),
        counts=own,
        position_ids=position_ids,
        next_ids=_next_ids(columns, cut, own) if piece.learning else (-1,) * len(own),
        labels=pick(columns.labels),
        learning=piece.learning,
        needs_context=more,
    )
    return segment, Placement(where, own, consecutive and min(own) == size)


def _tokens_of_piece(columns: Columns, piece: Piece) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """Columns of each row's tokens [B, n], how many there are per row, and how many have to be read."""
    rows, _ = columns.shape
    device = columns.device
    if columns.real is None:
        where = torch.arange(piece.start, piece.end, device=device).expand(rows, -1)
        known = (piece.end - piece.start,) * rows
        needed = tuple(min(max(last - piece.start, 0), piece.end - piece.start) for last in columns.last_needed)
        return where, known, needed
    real = columns.real[:, piece.start : piece.end]
    where = real.logical_not().long().argsort(dim=1, stable=True) + piece.start
    last = torch.tensor(columns.last_needed, device=device)[:, None]
    needed = real & (torch.arange(piece.start, piece.end, device=device) < last)
    return where, tuple(real.sum(dim=1).tolist()), tuple(needed.sum(dim=1).tolist())


def _next_ids(columns: Columns, cut: _Cut, counts: Sequence[int]) -> tuple[int, ...]:
    """Per row the id of the token after the segment's last one; -1 when the piece does not hold it."""
    following = [begin + count for begin, count in zip(cut.begin, counts, strict=True)]
    last = torch.tensor(following, device=cut.where.device)[:, None]
    index = cut.where.gather(1, last.clamp_max(cut.where.shape[1] - 1))
    ids = columns.ids.gather(1, index).squeeze(1).tolist()
    return tuple(id if place < total else -1 for id, place, total in zip(ids, following, cut.known, strict=True))


@dataclass
class ColumnWriter:
    """Collects outputs of tokens and returns them in columns [first, end); padding holds zeros."""

    rows: int
    first: int
    end: int
    consecutive: bool = True
    parts: list[tuple[torch.Tensor, Placement]] = field(default_factory=list)
    sources: list[tuple[torch.Tensor, Placement]] = field(default_factory=list)

    def add_chunks(self, chunks: Sequence[torch.Tensor], placement: Placement) -> None:
        """Consecutive chunks [B, n, ...] of the tokens at `placement`, which `followed` follows back.

        Slots behind the last token are left out.
        """
        start = 0
        for chunk in chunks:
            own = placement.part(start, chunk.shape[1])
            start += chunk.shape[1]
            width = own.columns.shape[1]
            if width:
                self.sources.append((chunk, own))
                self.add(chunk if width == chunk.shape[1] else chunk[:, :width], own)

    def add(self, values: torch.Tensor, placement: Placement) -> None:
        """values [B, n, ...] of the tokens at `placement`."""
        if placement.consecutive:
            # Only what is asked for is kept: a long text may want nothing but its last column.
            start = int(placement.columns[0, 0])
            skipped = min(max(self.first - start, 0), values.shape[1])
            values = values[:, skipped:].clone() if skipped and not values.requires_grad else values[:, skipped:]
            placement = Placement(placement.columns[:, skipped:], placement.counts, True)
            if not values.shape[1]:
                return
        else:
            tokens = torch.arange(values.shape[1], device=values.device)
            counts = torch.tensor(placement.counts, device=values.device)[:, None]
            wanted = (tokens < counts) & (placement.columns >= self.first)
            values, columns = values[wanted], wanted.nonzero()[:, :1]
            columns = torch.cat([columns, placement.columns[wanted][:, None]], dim=1)
            placement = Placement(columns, placement.counts, False)
            self.consecutive = False
        self.parts.append((values, placement))

    def result(self) -> torch.Tensor:
        """[B, end - first, ...]"""
        if self.consecutive:
            values = torch.cat([values for values, _ in self.parts], dim=1)
            missing = self.end - self.first - values.shape[1]
            return F.pad(values, [0, 0] * (values.dim() - 2) + [0, missing]) if missing else values
        flat, places = zip(*(self._flat(values, placement) for values, placement in self.parts), strict=True)
        flat, places = torch.cat(flat), torch.cat(places)
        result = flat.new_zeros(self.rows, self.end - self.first, *flat.shape[1:])
        return result.index_put((places[:, 0], places[:, 1] - self.first), flat)

    def followed(self) -> torch.Tensor:
        """As `result`, with the gradient of the chunks: `retain_grad()` shows what flows through the model itself.

        Where the columns are one chunk it is returned itself. Elsewhere the result is a copy, from which nothing in the
        model is computed; then hooks on the chunks bring it their gradient.
        """
        (first, placement), *others = self.sources
        if not others and placement.consecutive and first.shape[1] == self.end - self.first:
            return first
        result = self.result()
        for chunk, own in self.sources:
            follow_gradient(result, chunk, partial(_to_columns, placement=own))
        return result

    def _flat(self, values: torch.Tensor, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
        if not placement.consecutive:
            return values, placement.columns
        rows = torch.arange(self.rows, device=values.device)[:, None].expand(-1, values.shape[1])
        return values.flatten(0, 1), torch.stack([rows, placement.columns], dim=-1).flatten(0, 1)


def _to_columns(state: torch.Tensor, gradient: torch.Tensor, placement: Placement) -> None:
    """Write the gradient of tokens at `placement` into that of the columns."""
    gradient = gradient[:, : placement.columns.shape[1]]
    rows = torch.arange(gradient.shape[0], device=gradient.device)[:, None]
    counts = torch.tensor(placement.counts, device=gradient.device)[:, None]
    real = torch.arange(gradient.shape[1], device=gradient.device) < counts
    state[rows.expand_as(real)[real], placement.columns[real]] = gradient[real]


def follow_gradient(
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


def past_columns(
    attention_mask: torch.Tensor | None, columns_read: int, tokens: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    """Per row, the columns of the tokens that earlier calls have read, in order.

    A mask over all columns tells them; without one, padding is taken to stand on the left.
    """
    places = [torch.arange(columns_read - count, columns_read, device=device) for count in tokens]
    if attention_mask is None or attention_mask.shape[1] <= columns_read or columns_read == 0:
        return places
    masked = [row.nonzero().squeeze(1).to(device) for row in attention_mask[:, :columns_read]]
    return [own if len(own) == len(place) else place for own, place in zip(masked, places, strict=True)]


class AttentionWriter:
    """Collects one block's attention weights and returns them over the columns of a call.

    Args:
        history: key columns from before the call, the last ones that were read.
        columns_read: columns from before the call.
        past: per row, the columns of its tokens from before the call; those beyond `history` are left out.
        columns_of_rows: per row, the columns of its tokens in the call, in order.
        columns: N, columns of the call.
    """

    def __init__(
        self,
        history: int,
        columns_read: int,
        past: Sequence[torch.Tensor],
        columns_of_rows: Sequence[torch.Tensor],
        columns: int,
    ):
        self.history = history
        # The place of every token of a row among the keys, those from before the call first; negative: left out.
        shifted = zip(past, columns_of_rows, strict=True)
        self.key_places = [torch.cat([old - columns_read, new]) + history for old, new in shifted]
        self.past_tokens = [len(own) for own in past]
        self.columns_of_rows = columns_of_rows
        self.columns = columns
        self.parts = []

    def add(
        self, weights: torch.Tensor, first_queries: Sequence[int], begin: Sequence[int], end: Sequence[int]
    ) -> None:
        """weights [B, heads, Q, K]; per row, among the call's tokens, the index of query 0, of the first query that
        is new, and of the first one behind them."""
        self.parts.append((weights, first_queries, begin, end))

    def result(self) -> torch.Tensor:
        """[B, heads, N, history + N]; zero where a query or key is padding."""
        weights, firsts, _, ends = self.parts[0]
        size = (*weights.shape[:2], self.columns, self.history + self.columns)
        alone = len(self.parts) == 1 and weights.shape == size
        if alone and not self.history and not any(firsts) and min(ends) == self.columns:
            return weights
        result = weights.new_zeros(size)
        for weights, *bounds in self.parts:
            for row, (first, begin, end) in enumerate(zip(*bounds, strict=True)):
                places, earlier = self.columns_of_rows[row], self.past_tokens[row]
                queries = torch.arange(weights.shape[2], device=weights.device) + first
                keys = torch.arange(weights.shape[3], device=weights.device) + earlier + first
                keys = keys - (weights.shape[3] - weights.shape[2])
                good_queries = (queries >= begin) & (queries < end)
                key_columns = self.key_places[row][keys.clamp(0, len(self.key_places[row]) - 1)]
                good_keys = (keys >= 0) & (keys < earlier + end) & (key_columns >= 0)
                block = weights[row][:, good_queries][:, :, good_keys]
                result[row][:, places[queries[good_queries]][:, None], key_columns[good_keys][None, :]] = block
        return result


def attention_writers(
    config,
    real: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    tokens_before: Sequence[int],
    columns_read: int,
    columns: int,
    device: torch.device,
) -> dict[int, AttentionWriter]:
    """Collectors of attention weights by the index of their block, for blocks with attention.

    Args:
        real: [B, columns] bool, False at padding; None when every column of the call holds a token.
        attention_mask: as the call was given it.
        tokens_before, columns_read: what earlier calls have read.
    """
    every = torch.arange(columns, device=device)
    places = [every if real is None else every[real[row]] for row in range(len(tokens_before))]
    past = past_columns(attention_mask, columns_read, tokens_before, device)
    kept = {"full_attention": columns_read, "sliding_attention": min(columns_read, (config.sliding_window or 1) - 1)}
    return {
        index: AttentionWriter(kept[kind], columns_read, past, places, columns)
        for index, kind in enumerate(config.layer_types)
        if kind in kept
    }
