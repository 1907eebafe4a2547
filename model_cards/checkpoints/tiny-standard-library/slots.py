"""Slots: the pending and the new tokens of every row side by side, so that mini-batches begin at equal places.

row 0   | pending pending new new | new new new new | new
row 1   | pending new new new     | new             |
"""

import torch

from .context import LearnedContext, Pending, gather_columns
from .inner_loop import NO_TARGET
from .reader import Segment


class Slots:
    """Slots of one segment.

    Attributes:
        segment: the new tokens.
        starts: the slot of the first new token, per row: the number of pending tokens.
        totals: tokens in slots, per row.
        length: the largest total.
        inputs: [B, length, D], the hidden states that enter the inner loop.
        ids, labels: [B, length]; labels are None without an outer loss.
        position_ids: [1 or B, length].
    """

    def __init__(self, context: LearnedContext, segment: Segment, inputs: torch.Tensor):
        self.segment = segment
        self.starts = context.pending_counts
        self.totals = tuple(map(sum, zip(self.starts, segment.counts, strict=True)))
        self.length = max(self.totals)
        pending, positions, blank = context.pending, segment.position_ids, None
        if pending is not None:
            positions = positions.expand(context.rows, -1)
            blank = torch.full_like(pending.ids, NO_TARGET)
        self.inputs = self._align(None if pending is None else pending.inputs.to(inputs.dtype), inputs)
        self.ids = self._align(None if pending is None else pending.ids, segment.ids)
        self.position_ids = self._align(None if pending is None else pending.positions, positions)
        self.labels = None if segment.labels is None else self._align(blank, segment.labels)

    def new_tokens(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots [B, length, ...] -> new tokens [B, T, ...]."""
        if min(self.starts) == max(self.starts):
            return slots[:, self.starts[0] :]
        index = torch.tensor(self.starts)[:, None] + torch.arange(self.segment.length)
        return gather_columns(slots, index.clamp_max(self.length - 1))

    def targets(self, bos_token_id: int | None) -> torch.Tensor:
        """[B, length]: the id after each slot's token; `NO_TARGET` where it is unknown or BOS."""
        device = self.ids.device
        last = torch.tensor(self.totals, device=device)[:, None] - 1
        following = torch.tensor(self.segment.next_ids, device=device)[:, None]
        slots = torch.arange(self.length, device=device)
        targets = torch.where(slots == last, following, self.ids.roll(-1, dims=1))
        unknown = (slots > last) | (targets < 0)
        if bos_token_id is not None:
            unknown = unknown | (targets == bos_token_id)
        return targets.masked_fill(unknown, NO_TARGET)

    def left_after(self, first_slots: tuple[int, ...]) -> Pending | None:
        """The tokens from slot `first_slots[row]` on, as the pending mini-batch; None when no token is left."""
        counts = tuple(total - first for total, first in zip(self.totals, first_slots, strict=True))
        if max(counts) == 0:
            return None
        tensors = (self.inputs, self.ids, self.position_ids.expand(len(counts), -1))
        if min(first_slots) == max(first_slots):
            return Pending(counts, *(tensor[:, first_slots[0] :] for tensor in tensors))
        index = torch.tensor(first_slots)[:, None] + torch.arange(max(counts))
        index = index.clamp_max(self.length - 1)
        return Pending(counts, *(gather_columns(tensor, index) for tensor in tensors))

    def _align(self, pending: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        if pending is None:
            return new[:, : self.length]
        width = min(pending.shape[1], max(self.starts))
        both = torch.cat([pending[:, :width], new], dim=1)
        if min(self.starts) == max(self.starts):
            return both[:, : self.length]
        slots, starts = torch.arange(self.length), torch.tensor(self.starts)[:, None]
        index = torch.where(slots < starts, slots, slots - starts + width)
        return gather_columns(both, index.clamp_max(both.shape[1] - 1))
