"""TTT-KVB as a mixer: sliding-window attention and fast weights that bind values to keys, side by side.

The layer is that of LaCT (arXiv 2505.23884), the baseline of arXiv 2512.23675. Queries, keys and values are projected
once and used twice,

    output = o_proj(attention(q, k, v) + s * norm(f_W(q')))          q', k' = rope(unit(silu(scale * . + offset)))
                                                                     v' = silu(v),  s = silu(scale_proj(x))

with one scale and offset per channel for queries and for keys, and f_W and its learning as in `ttt_kvb`.

Axis letters: B batch rows, T tokens of the call, D hidden size, N heads of the fast weights, C their channels,
H their hidden channels.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .layers import KeysValues, TTTE2ERMSNorm, rotate
from .ttt_attention_mixer import TTTLayersAttention
from .ttt_kvb import (
    KVBMemory,
    KVBRule,
    KVBState,
    KVBTokens,
    SwiGLUWeights,
    kvb_initial_state,
    kvb_scan,
    row_norms,
    token_learning_rates,
    unit_view,
)
from .ttt_linear_mlp import default_checkpoint_every

BASE_LEARNING_RATE = 0.001  # of LaCT


class KVBMixerState(NamedTuple):
    """What a block remembers.

    Attributes:
        attention: keys and values in the window.
        weights: fast weights, at least float32.
        momentum: of them, or None.
        pending: tokens that no step has used yet, at most one mini-batch.
    """

    attention: KeysValues
    weights: SwiGLUWeights
    momentum: SwiGLUWeights | None
    pending: KVBTokens


class TTTKVBMixer(TTTLayersAttention):
    """Attention within a window, and fast weights for what has left it.

    Attributes:
        views: what the fast weights see of the projections, besides the values.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        size, heads = config.hidden_size, config.ttt_kvb_num_heads
        self.channels = size // heads
        hidden = config.ttt_kvb_intermediate_ratio * self.channels
        self.rule = KVBRule(
            config.mini_batch_size, config.ttt_kvb_output_rule, config.ttt_kvb_weight_norm, config.ttt_kvb_momentum
        )
        self.initial_gate = nn.Parameter(torch.empty(heads, hidden, self.channels))
        self.initial_up = nn.Parameter(torch.empty(heads, hidden, self.channels))
        self.initial_down = nn.Parameter(torch.empty(heads, self.channels, hidden))
        self.views = ("query", "key") if config.ttt_kvb_output_rule == "query" else ("key",)
        for name in self.views:
            self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(size)))
            self.register_parameter(f"{name}_offset", nn.Parameter(torch.zeros(size)))
        self.learning_rate_proj = nn.Linear(size, 3 * heads)
        self.momentum_proj = nn.Linear(size, heads) if config.ttt_kvb_momentum else None
        self.scale_proj = nn.Linear(size, heads)
        self.fast_norm = TTTE2ERMSNorm(self.channels, config.rms_norm_eps)

    @staticmethod
    def history_columns(state: KVBMixerState) -> int:
        return TTTLayersAttention.history_columns(state.attention)

    def forward(
        self, x: torch.Tensor, call, state: KVBMixerState | None
    ) -> tuple[torch.Tensor, KVBMixerState, torch.Tensor | None]:
        """As every mixer: x [B, T, D] -> the output [B, T, D], the state after it, attention weights or None."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        before = None if state is None else state.attention
        attended, keys_values, weights = self.read(query, key, value, call, before)
        fast, after = self.bind(x, (query, key, value), call, state)
        state = KVBMixerState(keys_values, after.memory.weights, after.memory.momentum, after.pending)
        return self.o_proj(attended + fast), state, weights

    def bind(
        self, x: torch.Tensor, projections: tuple[torch.Tensor, ...], call, state: KVBMixerState | None
    ) -> tuple[torch.Tensor, KVBState]:
        """What the fast weights answer, scaled, [B, T, D], and their state after the call's tokens."""
        query, key, value = projections
        angles = call.attention.position_embeddings
        reads = self.view(query, "query", angles) if "query" in self.views else None
        rates = token_learning_rates(self.learning_rate_proj(x).unflatten(-1, (-1, 3)), BASE_LEARNING_RATE)
        factors = None
        if self.momentum_proj is not None:
            factors = self.momentum_proj(x).sigmoid().unsqueeze(-1).transpose(1, 2)
        tokens = KVBTokens(self.view(key, "key", angles), self.heads(F.silu(value)), rates.transpose(1, 2), factors)
        every = None
        if call.checkpointing and torch.is_grad_enabled():
            steps = max(1, x.shape[1] // self.rule.mini_batch_size)
            every = self.config.inner_checkpoint_every or default_checkpoint_every(steps)
        before = self.state_before(x.shape[0], call.tokens_before, state)
        answers, after = kvb_scan(before, reads, tokens, self.rule, call.counts, every)
        scale = F.silu(self.scale_proj(x)).transpose(1, 2).unsqueeze(-1)  # [B, N, T, 1]
        fast = scale * self.fast_norm(answers.to(x.dtype))
        return fast.transpose(1, 2).flatten(2), after

    def state_before(self, rows: int, tokens: tuple[int, ...], state: KVBMixerState | None) -> KVBState:
        """The fast weights' state after `tokens` tokens of each row."""
        initial = SwiGLUWeights(self.initial_gate, self.initial_up, self.initial_down)
        start = kvb_initial_state(initial, rows, self.rule)
        if state is None:
            return start
        size = self.rule.mini_batch_size
        pending = tuple(count - max(0, count - 1) // size * size for count in tokens)
        norms = row_norms(start.memory.weights)
        return KVBState(KVBMemory(state.weights, norms, state.momentum), state.pending, pending)

    def view(self, projected: torch.Tensor, name: str, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Queries or keys of the fast weights, [B, T, D] -> [B, N, T, C]: unit length, then RoPE as in attention."""
        scaled = projected * getattr(self, f"{name}_scale") + getattr(self, f"{name}_offset")
        unit = unit_view(self.heads(scaled)).transpose(1, 2).flatten(2)
        turned = rotate(unit.unflatten(-1, (-1, self.head_dim)).transpose(1, 2), *angles)
        return self.heads(turned.transpose(1, 2).flatten(2))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, N, T, C]."""
        return x.unflatten(-1, (-1, self.channels)).transpose(1, 2)
