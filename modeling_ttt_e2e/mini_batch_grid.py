"""Where the tokens of a call stand in their rows' mini-batches.

Every row counts its own real tokens, so the mini-batches of two rows begin at different tokens. A grid gives them
equal places: row b's first new token stands at slot `tokens_before[b] mod K`, and mini-batch i of all rows in slots
i K to (i + 1) K - 1. Slots without a token, before the first and after the last, take no part in learning.

Axis letters: B batch rows, T tokens of the call (aligned left), G mini-batches, N slots of a mini-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .context import gather_columns


@dataclass(frozen=True)
class MiniBatchGrid:
    """The slots of one call; N is K, or the number of tokens where they all fit into the rows' current mini-batches.

    Attributes:
        tokens: T.
        shape: (G, N).
        columns: [B, G N] the token in each slot, None when slot and token have the same number.
        slots: [B, T] the slot of each token, None likewise.
        real: [B, G N] bool, whether a slot holds a token; None when all do.
        positions: [1 or B, G N] position within the mini-batch, 0 to K - 1.
        complete: per mini-batch and row, whether the mini-batch is full after its slots.
    """

    tokens: int
    shape: tuple[int, int]
    columns: torch.Tensor | None
    slots: torch.Tensor | None
    real: torch.Tensor | None
    positions: torch.Tensor
    complete: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(
        cls, tokens_before: Sequence[int], counts: Sequence[int], tokens: int, size: int, device: torch.device
    ) -> "MiniBatchGrid":
        """The grid of a call.

        Args:
            tokens_before: real tokens that each row read earlier.
            counts: real tokens of each row in this call, at most `tokens`, which is T.
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
            real = None if min(counts) == tokens else places < last - first
            same = min(offsets) == max(offsets)
            return cls(tokens, (1, tokens), None, None, real, positions[:1] if same else positions, complete)
        places = torch.arange(steps * size, device=device)
        columns = slots = real = None
        if max(offsets) > 0:
            columns = (places - first).clamp(0, tokens - 1)
            slots = (torch.arange(tokens, device=device) + first).clamp_max(steps * size - 1)
        if max(offsets) > 0 or min(totals) < steps * size:
            real = (places >= first) & (places < last)
        return cls(tokens, (steps, size), columns, slots, real, places[None] % size, complete)

    def place(self, tokens: torch.Tensor) -> torch.Tensor:
        """Values of tokens [B, T, ...] -> of slots [B, G, N, ...]; empty slots hold zeros or copies."""
        slots = self.shape[0] * self.shape[1]
        if self.columns is not None:
            placed = gather_columns(tokens, self.columns)
        else:
            missing = slots - tokens.shape[1]
            placed = F.pad(tokens, [0, 0] * (tokens.dim() - 2) + [0, missing]) if missing else tokens
        return placed.unflatten(1, self.shape)

    def take(self, slots: torch.Tensor) -> torch.Tensor:
        """Values of slots [B, G, N, ...] -> of tokens [B, T, ...]."""
        flat = slots.flatten(1, 2)
        return flat[:, : self.tokens] if self.slots is None else gather_columns(flat, self.slots)
