"""Where a row's tokens stand: from the positions of a padded batch to its rows' tokens, and on to segments of them.

A call has positions, some of them padding; a row has tokens. Reading works on tokens: each row's own are moved to the
left, and the outputs are returned to their positions (`outputs`). So padding changes nothing, wherever it stands.

Axis letters: B batch rows, N positions of the call, T tokens of the longest row, D hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .context import gather_positions


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of every row, read at once.

    Attributes:
        ids: [B, t], or None when only embeddings are known.
        embeddings: [B, t, D], or None to embed the ids.
        position_ids: [1 or B, t].
        labels: [B, t] what each token predicts in the outer loss, or None.
        begin: per row, which of the call's tokens is the first one here.
        counts: tokens per row; the slots behind them hold anything.
        next_ids: [B] the id that follows each row's last token here, anything where it is not known; None if nowhere.
        next_known: per row, whether it is.
        learning: take inner steps.
        needs_context: the learned context after this segment will be used.
    """

    ids: torch.Tensor | None
    embeddings: torch.Tensor | None
    position_ids: torch.Tensor
    labels: torch.Tensor | None
    begin: tuple[int, ...]
    counts: tuple[int, ...]
    next_ids: torch.Tensor | None
    next_known: tuple[bool, ...]
    learning: bool
    needs_context: bool

    @property
    def length(self) -> int:
        return self.position_ids.shape[1]

    @property
    def end(self) -> tuple[int, ...]:
        """Per row, one past its last token here, among the call's."""
        return added(self.begin, self.counts)


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens begin[row] to end[row] - 1 of every row that are read in one manner: learning on or off.

    `first`: the position with which it begins.
    """

    begin: tuple[int, ...]
    end: tuple[int, ...]
    first: int
    learning: bool


@dataclass(frozen=True)
class Tokens:
    """The input of a call, token by token.

    Attributes:
        ids: [B, T] or None; embeddings: [B, T, D] or None; labels: [B, T] what each token predicts, or None.
        position_ids: [1 or B, T].
        counts: tokens per row.
        needed: per row, how many of them, from the first on, anyone will use the output of.
        starts: position id of each row's next token before the call.
        length: N.
        token_mask: [B, N] bool, which positions hold a token; None when all do. seen: the same, on the CPU.
        where: [B, T] the position of each token, on the CPU; None likewise.
        counted: position ids were not given, but count each row's tokens.
    """

    ids: torch.Tensor | None
    embeddings: torch.Tensor | None
    labels: torch.Tensor | None
    position_ids: torch.Tensor
    counts: tuple[int, ...]
    needed: tuple[int, ...]
    starts: tuple[int, ...]
    length: int
    token_mask: torch.Tensor | None
    seen: torch.Tensor | None
    where: torch.Tensor | None
    counted: bool

    @classmethod
    def of(
        cls,
        ids: torch.Tensor | None,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        token_mask: torch.Tensor | None,
        starts: tuple[int, ...],
        last_needed: Sequence[int] | None = None,
    ) -> "Tokens":
        """Move the tokens of a call to the left.

        Args:
            ids, labels, position_ids: [B, N] or None; embeddings: [B, N, D] or None; without `position_ids` each
                row's tokens are counted.
            token_mask: as `checks.read_attention_mask` returns it.
            last_needed: per row, one past the last position whose output anyone will use; None: all are used.
        """
        given = ids if ids is not None else embeddings
        (rows, length), device, where = given.shape[:2], given.device, None
        counts, needed = (length,) * rows, last_needed
        # The only look at values in a call: on a GPU it waits for all that the device has been asked for before.
        seen = None if token_mask is None else token_mask.cpu()
        if seen is None or bool(seen.all()):
            token_mask = seen = None
        else:
            counts = tuple(seen.sum(dim=1).tolist())
            if last_needed is not None:
                within = torch.arange(length) < torch.tensor(last_needed)[:, None]
                needed = (seen & within).sum(dim=1).tolist()
            where = seen.logical_not().long().argsort(dim=1, stable=True)[:, : max(1, *counts)]

        there = None if where is None else where.to(device)

        def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor if tensor is None or there is None else gather_positions(tensor, there)

        position_ids, counted = pick(position_ids), position_ids is None
        if position_ids is None:
            longest = length if where is None else where.shape[1]
            first = starts[:1] if len(set(starts)) == 1 else starts
            position_ids = torch.tensor(first, device=device)[:, None] + torch.arange(longest, device=device)
        tensors = (pick(ids), pick(embeddings), pick(labels), position_ids)
        needed = counts if needed is None else tuple(needed)
        return cls(*tensors, counts, needed, starts, length, token_mask, seen, where, counted)

    @property
    def rows(self) -> int:
        return len(self.counts)

    @property
    def device(self) -> torch.device:
        return self.position_ids.device

    @property
    def next_positions(self) -> tuple[int, ...]:
        """Position id of each row's next token after the call."""
        if self.counted:
            return added(self.starts, self.counts)
        last = torch.tensor(self.counts, device=self.device)[:, None] - 1
        found = self.position_ids.expand(self.rows, -1).gather(1, last.clamp_min(0)).squeeze(1).tolist()
        rows = zip(self.starts, self.counts, found, strict=True)
        return tuple(position + 1 if count else start for start, count, position in rows)

    def places(self, begin: Sequence[int], length: int) -> torch.Tensor:
        """Positions [1 or B, length] of tokens begin[row], begin[row] + 1, ..., on the CPU; beyond, the last one's."""
        if self.where is None:
            begin = begin[:1] if min(begin) == max(begin) else begin
            index = torch.tensor(begin)[:, None] + torch.arange(length)
            return index.clamp_max(self.length - 1)
        return _window(self.where, begin, length)

    def stretches(self, learning: bool, span: tuple[int, int] | None, positions_read: int) -> list[Stretch]:
        """The whole call, or what stands before, within and after the positions `span` that may be learned.

        Args:
            span: counted from the first position ever read, of which the call begins at `positions_read`.
        """
        if not learning or span is None:
            return [Stretch((0,) * self.rows, self.counts, 0, learning)]
        first, last = (min(max(bound - positions_read, 0), self.length) for bound in span)
        bounds = [(0, first, False), (first, last, True), (last, self.length, False)]
        return [
            Stretch(self._tokens_before(start), self._tokens_before(end), start, learns)
            for start, end, learns in bounds
            if end > start
        ]

    def segments(
        self, stretch: Stretch, waiting: Sequence[int], mini_batch_size: int, size: int | None, needs_context: bool
    ) -> Iterator[Segment]:
        """Cut a stretch into segments of at most `size` tokens (None: one segment).

        Where the begun mini-batch of a row is filled up and more follows, its rest is a segment of its own: then a
        mini-batch never mixes tokens of earlier calls, whose keys and values are constants, with those that follow, and
        no row depends on how far its neighbours have read.

        Args:
            waiting: tokens of each row's begun mini-batch before the stretch, at most `mini_batch_size`.
            needs_context: the learned context after the stretch will be used.
        """
        begin, end = stretch.begin, tuple(map(min, stretch.end, self.needed))
        left = tuple(max(last - first, 0) for first, last in zip(begin, end, strict=True))
        if stretch.learning:
            known = tuple(last - first for first, last in zip(begin, stretch.end, strict=True))
            rest = _rest_of_mini_batches(waiting, left, known, mini_batch_size)
            if any(rest):
                left = tuple(count - own for count, own in zip(left, rest, strict=True))
                more = needs_context or max(left) > 0
                # What follows is left to the next segment: the step of the mini-batch is taken there.
                yield self._segment(begin, rest, added(begin, rest), True, more)
                begin = added(begin, rest)
        longest = max(left)
        if stretch.first == 0 and not any(self.needed):
            longest = 1  # for the shapes of the outputs
        step = max(1, size or longest)
        for first in range(0, longest, step):
            width = min(step, longest - first)
            own = tuple(min(max(count - first, 0), width) for count in left)
            more = needs_context or first + width < longest
            yield self._segment(added(begin, (first,) * self.rows), own, stretch.end, stretch.learning, more)

    def _segment(
        self,
        begin: tuple[int, ...],
        counts: tuple[int, ...],
        known: tuple[int, ...],
        learning: bool,
        needs_context: bool,
    ) -> Segment:
        """`known`: per row, one past the last token whose id may be looked at."""
        length, following = max(1, *counts), added(begin, counts)
        next_known = tuple(learning and place < end for place, end in zip(following, known, strict=True))

        def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else _window(tensor, begin, length)

        return Segment(
            ids=pick(self.ids),
            embeddings=pick(self.embeddings),
            position_ids=pick(self.position_ids),
            labels=pick(self.labels),
            begin=begin,
            counts=counts,
            next_ids=_window(self.ids, following, 1).squeeze(1) if any(next_known) else None,
            next_known=next_known,
            learning=learning,
            needs_context=needs_context,
        )

    def _tokens_before(self, position: int) -> tuple[int, ...]:
        if self.seen is None:
            return (position,) * self.rows
        return tuple(self.seen[:, :position].sum(dim=1).tolist())


def added(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """The sums of two numbers per row."""
    return tuple(one + other for one, other in zip(first, second, strict=True))


def _window(tensor: torch.Tensor, begin: Sequence[int], length: int) -> torch.Tensor:
    """Places begin[row] to begin[row] + length - 1 of a tensor [1 or B, T, ...]; beyond its end the last one."""
    if min(begin) == max(begin) and begin[0] + length <= tensor.shape[1]:
        return tensor[:, begin[0] : begin[0] + length]
    index = torch.tensor(begin, device=tensor.device)[:, None] + torch.arange(length, device=tensor.device)
    return gather_positions(tensor.expand(len(begin), *tensor.shape[1:]), index.clamp_max(tensor.shape[1] - 1))


def _rest_of_mini_batches(
    waiting: Sequence[int], left: Sequence[int], known: Sequence[int], size: int
) -> tuple[int, ...]:
    """Per row, the tokens that fill up its begun mini-batch; zeros when no row goes beyond the one that it is in."""
    rest = tuple(-count % size for count in waiting)
    if all(tokens <= (own or size) for tokens, own in zip(known, rest, strict=True)):
        return (0,) * len(rest)
    return tuple(min(count, own) for count, own in zip(left, rest, strict=True))


@dataclass(frozen=True)
class MiniBatchGrid:
    """Where the tokens of a call, aligned left, stand in their rows' mini-batches of K tokens.

    Every row counts its own tokens, so the mini-batches of two rows begin at different ones. A grid gives them equal
    places: row b's first new token stands at slot `tokens_before[b] mod K`, and mini-batch i of all rows in slots i K
    to (i + 1) K - 1. Slots without a token, before the first and after the last, take no part in learning. There are G
    mini-batches of N slots; N is K, or the number of tokens where they all fit into the rows' current mini-batches.

    Attributes:
        tokens: T.
        shape: (G, N).
        token_of_slot: [B, G N] the token in each slot, None when slot and token have the same number.
        slot_of_token: [B, T] the slot of each token, None likewise.
        slot_mask: [B, G N] bool, whether a slot holds a token; None when all do.
        positions: [1 or B, G N] position within the mini-batch, 0 to K - 1.
        complete: per mini-batch and row, whether the mini-batch is full after its slots.
    """

    tokens: int
    shape: tuple[int, int]
    token_of_slot: torch.Tensor | None
    slot_of_token: torch.Tensor | None
    slot_mask: torch.Tensor | None
    positions: torch.Tensor
    complete: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(
        cls, tokens_before: Sequence[int], counts: Sequence[int], tokens: int, size: int, device: torch.device
    ) -> "MiniBatchGrid":
        """The grid of a call.

        Args:
            tokens_before: tokens that each row read earlier.
            counts: tokens of each row in this call, at most `tokens`, which is T.
            size: K, tokens of a mini-batch.
        """
        offsets = [before % size for before in tokens_before]
        totals = [offset + count for offset, count in zip(offsets, counts, strict=True)]
        steps = max(1, -(-max(totals) // size))
        complete = tuple(tuple(total >= (step + 1) * size for total in totals) for step in range(steps))
        first = torch.tensor(offsets, device=device)[:, None]
        last = torch.tensor(totals, device=device)[:, None]
        if steps == 1:
            # Slots are the tokens themselves: positions differ from row to row, which costs nothing.
            places = torch.arange(tokens, device=device)
            positions = (first + places).clamp_max(size - 1)
            slot_mask = None if min(counts) == tokens else places < last - first
            same = min(offsets) == max(offsets)
            return cls(tokens, (1, tokens), None, None, slot_mask, positions[:1] if same else positions, complete)
        places = torch.arange(steps * size, device=device)
        token_of_slot = slot_of_token = slot_mask = None
        if max(offsets) > 0:
            token_of_slot = (places - first).clamp(0, tokens - 1)
            slot_of_token = (torch.arange(tokens, device=device) + first).clamp_max(steps * size - 1)
        if max(offsets) > 0 or min(totals) < steps * size:
            slot_mask = (places >= first) & (places < last)
        return cls(tokens, (steps, size), token_of_slot, slot_of_token, slot_mask, places[None] % size, complete)

    def place(self, tokens: torch.Tensor) -> torch.Tensor:
        """Values of tokens [B, T, ...] -> of slots [B, G, N, ...]; empty slots hold zeros or copies."""
        slots = self.shape[0] * self.shape[1]
        if self.token_of_slot is not None:
            placed = gather_positions(tokens, self.token_of_slot)
        else:
            missing = slots - tokens.shape[1]
            placed = F.pad(tokens, [0, 0] * (tokens.dim() - 2) + [0, missing]) if missing else tokens
        return placed.unflatten(1, self.shape)

    def take(self, slots: torch.Tensor) -> torch.Tensor:
        """Values of slots [B, G, N, ...] -> of tokens [B, T, ...]."""
        flat = slots.flatten(1, 2)
        return flat[:, : self.tokens] if self.slot_of_token is None else gather_positions(flat, self.slot_of_token)
