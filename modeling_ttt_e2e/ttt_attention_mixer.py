"""Attention as a mixer of a [`TTTLayersModel`]; see `ttt_mixers` for what a mixer is.

Axis letters: B batch rows, T tokens of the call, D hidden size, C channels of a head.
"""

from dataclasses import dataclass

import torch

from .attention import AttentionInputs
from .context import take_last
from .layers import KeysValues, TTTE2EAttention
from .mini_batch_grid import MiniBatchGrid


@dataclass(frozen=True)
class MixerCall:
    """What all blocks of one call share.

    Attributes:
        tokens_before: real tokens that each row read in earlier calls.
        counts: real tokens of each row in this call.
        grid: where they stand in their mini-batches.
        attention: angles and masks of attention blocks; None in a model without any.
        checkpointing: recompute activations in the backward pass.
    """

    tokens_before: tuple[int, ...]
    counts: tuple[int, ...]
    grid: MiniBatchGrid
    attention: AttentionInputs | None
    checkpointing: bool


class TTTLayersAttention(TTTE2EAttention):
    """Attention whose state is the keys and values that later queries see, aligned right."""

    @staticmethod
    def history_columns(state: KeysValues) -> int:
        """Earlier keys that a state holds, for the masks; every mixer with attention inside has this."""
        return state[0].shape[2]

    def forward(
        self, x: torch.Tensor, call: MixerCall, state: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues, torch.Tensor | None]:
        """x [B, T, D] -> the output [B, T, D], the keys and values to keep, attention weights or None."""
        output, state, weights = self.read(self.q_proj(x), self.k_proj(x), self.v_proj(x), call, state)
        return self.o_proj(output), state, weights

    def read(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: MixerCall, state: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues, torch.Tensor | None]:
        """Attention without its projections.

        Args:
            query, key, value: projected tokens [B, T, heads x C].
            state: keys and values [B, key/value heads, columns, C] from before, rotated; None at the start.

        Returns:
            [B, T, heads x C], the keys and values to keep, and the weights [B, heads, T, columns + T] (eager only).
        """
        output, new, weights = self.mix(query, key, value, call.attention, state)
        columns = 0
        if state is not None:
            columns = state[0].shape[2]
            new = tuple(torch.cat([old.to(own.dtype), own], dim=2) for old, own in zip(state, new, strict=True))
        ends = [columns + count for count in call.counts]
        keep = max(ends) if self.sliding_window is None else self.sliding_window - 1
        return output, tuple(take_last(part, ends, keep) for part in new), weights
