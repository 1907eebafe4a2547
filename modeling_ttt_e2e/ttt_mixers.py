"""Mixers of a [`TTTLayersModel`]: TTT-Linear, TTT-MLP and attention, all with one calling convention.

A mixer is a module made by `Mixer(config, layer_idx)` and called as `mixer(x, call, state)`:

    x      [B, T, D] tokens, each row's own aligned left; what stands right of a row's last token means nothing
    call   [`MixerCall`], what all blocks of one call share
    state  what the same block returned for the tokens before, None at the start: nested tuples of tensors with the
           rows on the first axis (None allowed), never written in place, of a size that does not grow without bound
    ->     output [B, T, D], the state after each row's last token, attention weights or None

A mixer with attention inside also has `num_past(state)`, how many earlier keys its state holds. `MIXERS` names
the classes. Axis letters: B batch rows, T tokens of the call, D hidden size, H heads, C channels of a head,
G mini-batches, N their slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .attention import AttentionInputs
from .context import take_last
from .layers import TTTE2EAttention, TTTE2ERMSNorm, rotate
from .sinks import KeysValues, Past, grown_pair
from .tokens import MiniBatchGrid
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
from .ttt_linear_mlp import (
    NORM_EPS,
    InnerLearner,
    LearnerState,
    TTTHeadNorm,
    Views,
    default_checkpoint_every,
    learn_slots,
    rotate_pairs,
    rotation_angles,
)
from .twice_differentiable import at_least_float32

KVB_LEARNING_RATE = 0.001  # of LaCT


@dataclass(frozen=True)
class MixerCall:
    """What all blocks of one call share.

    Attributes:
        tokens_before: tokens that each row read in earlier calls.
        counts: tokens of each row in this call.
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
    def num_past(state: KeysValues) -> int:
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
            state: keys and values [B, key/value heads, earlier tokens, C], rotated; None at the start.

        Returns:
            [B, T, heads x C], the keys and values to keep, and the weights [B, heads, T, earlier + T] (eager only).
        """
        output, (new, joined), weights = self.mix(query, key, value, call.attention, state and Past(state))
        num_past = 0 if state is None else state[0].shape[2]
        if joined is None:
            earlier = None if state is None else (state[0].to(new[0].dtype), state[1].to(new[1].dtype))
            joined = grown_pair(earlier, new)
        ends = [num_past + count for count in call.counts]
        keep = max(ends) if self.sliding_window is None else self.sliding_window - 1
        return output, (take_last(joined[0], ends, keep), take_last(joined[1], ends, keep)), weights


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
    """Sliding-window attention and fast weights that bind values to keys, side by side.

    The layer is that of LaCT (arXiv 2505.23884), the baseline of arXiv 2512.23675. Queries, keys and values are
    projected once and used twice,

        output = o_proj(attention(q, k, v) + s * norm(f_W(q')))      q', k' = rope(unit(silu(scale * . + offset)))
                                                                     v' = silu(v),  s = silu(scale_proj(x))

    with one scale and offset per channel for queries and for keys, and f_W and its learning as in `ttt_kvb`. Shapes:
    N heads of the fast weights, C their channels.

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
    def num_past(state: KVBMixerState) -> int:
        return TTTLayersAttention.num_past(state.attention)

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
        angles = call.attention.position_embeddings[self.layer_type]
        reads = self.view(query, "query", angles) if "query" in self.views else None
        rates = token_learning_rates(self.learning_rate_proj(x).unflatten(-1, (-1, 3)), KVB_LEARNING_RATE)
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


class TTTState(NamedTuple):
    """What a TTT-Linear or TTT-MLP block remembers.

    Attributes:
        inner: its weights and running sums, in at least float32.
        conv: last `ttt_conv_kernel - 1` inputs [B, taps, D] of the convolutions of queries and keys; None without.
    """

    inner: LearnerState
    conv: torch.Tensor | None


def causal_convolution(
    convolutions: Sequence[nn.Conv1d], x: torch.Tensor, past: torch.Tensor | None, counts: Sequence[int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Depthwise convolutions of the same input, each output seeing its own token and those before it.

    Args:
        convolutions: without padding, all with the same number of taps.
        x: [B, T, D], aligned left.
        past: [B, taps - 1, D] the inputs before; None for zeros.
        counts: tokens per row.

    Returns:
        Per convolution [B, T, D], and the last inputs [B, taps - 1, D] of each row.
    """
    taps = convolutions[0].kernel_size[0]
    if past is None:
        past = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    joined = torch.cat([past.to(x.dtype), x], dim=1)
    ends = [taps - 1 + count for count in counts]
    last = take_last(joined.unsqueeze(1), ends, taps - 1).squeeze(1)
    return [convolution(joined.mT).mT for convolution in convolutions], last


def make_convolution(config) -> nn.Conv1d:
    """A depthwise convolution over the hidden size; its caller prepends the inputs before the first token."""
    return nn.Conv1d(config.hidden_size, config.hidden_size, config.ttt_conv_kernel, groups=config.hidden_size)


class TTTMixer(nn.Module):
    """A TTT layer whose inner learner is a linear layer (`ttt_linear`) or a two-layer MLP (`ttt_mlp`).

    Queries, keys and values are views of the input; the inner loop learns to reconstruct values from keys, and the
    output is what it makes of the queries. The inner loop runs in at least float32, whatever the model's dtype.

    Attributes:
        form: the step of `ttt_linear_mlp` that computes it: None for the fast dual form.
    """

    form = None

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        size, heads = config.hidden_size, config.num_attention_heads
        self.heads, self.channels = heads, size // heads
        self.base_learning_rate = config.base_learning_rate(config.mixer_types[layer_idx]) / self.channels
        self.q_proj = nn.Linear(size, size, bias=False)
        if config.ttt_share_qk:
            self.conv_q, self.conv_k = make_convolution(config), make_convolution(config)
        else:
            self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        if config.ttt_use_gate:
            self.g_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.post_norm = nn.LayerNorm(size, eps=NORM_EPS)
        if config.ttt_learn_learning_rate:
            self.learning_rate_gate = nn.Linear(size, heads)
        if config.ttt_token_scale:
            self.token_scale_offset = nn.Parameter(torch.zeros(config.mini_batch_size))
        if config.ttt_layer_norm_residual:
            self.inner_norm = TTTHeadNorm(heads, self.channels)
        self.inner_sizes = [self.channels, self.channels]
        if config.mixer_types[layer_idx] == "ttt_mlp":
            self.inner_sizes.insert(1, config.ttt_intermediate_ratio * self.channels)
        if config.ttt_learn_initial_weights:
            for index, (ins, outs) in enumerate(pairwise(self.inner_sizes), start=1):
                self.register_parameter(f"initial_weight_{index}", nn.Parameter(torch.empty(heads, ins, outs)))
                if config.ttt_use_bias:
                    self.register_parameter(f"initial_bias_{index}", nn.Parameter(torch.zeros(heads, 1, outs)))

    def forward(self, x: torch.Tensor, call: MixerCall, state: TTTState | None) -> tuple[torch.Tensor, TTTState, None]:
        """See the head of this file."""
        dtype = at_least_float32(x.dtype)
        views, conv = self.views(x, call, None if state is None else state.conv)
        before = self.initial_state(x, dtype) if state is None else _in_dtype(state.inner, dtype)
        every = None
        if call.checkpointing and torch.is_grad_enabled():
            every = self.config.inner_checkpoint_every or default_checkpoint_every(call.grid.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            z, inner = learn_slots(views, before, self.learner(dtype), call.grid.complete, self.form, every)
        z = call.grid.take(z.permute(0, 2, 3, 1, 4).flatten(3)).to(x.dtype)
        z = self.post_norm(z)
        if self.config.ttt_use_gate:
            z = F.gelu(self.g_proj(x), approximate="tanh") * z
        return self.o_proj(z), TTTState(inner, conv), None

    def views(self, x: torch.Tensor, call: MixerCall, past: torch.Tensor | None) -> tuple[Views, torch.Tensor | None]:
        """Queries, keys, values and learning rates of x [B, T, D] in slots, and the last inputs of the convolutions."""
        query, key, last = self.q_proj(x), None, None
        if self.config.ttt_share_qk:
            (query, key), last = causal_convolution((self.conv_q, self.conv_k), query, past, call.counts)
        else:
            key = self.k_proj(x)
        dtype, grid = at_least_float32(x.dtype), call.grid

        def heads_in_slots(tokens: torch.Tensor) -> torch.Tensor:
            return grid.place(tokens.to(dtype)).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)

        query, key, value = (heads_in_slots(tokens) for tokens in (query, key, self.v_proj(x)))
        positions = grid.positions.unflatten(1, grid.shape)
        if self.config.ttt_rope_theta is not None:
            angles = rotation_angles(positions, self.channels, self.config.ttt_rope_theta)
            query, key = rotate_pairs(query, angles), rotate_pairs(key, angles)
        scale = self.token_scale(dtype, x.device)
        rate = self._rate(x, grid, dtype)
        return Views(query, key, value, rate, scale[positions].unsqueeze(1), scale[-1]), last

    def token_scale(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Factor of the running sum by position in the mini-batch, [K]."""
        if not self.config.ttt_token_scale:
            return torch.ones(self.config.mini_batch_size, dtype=dtype, device=device)
        mean = 1 / torch.arange(1, self.config.mini_batch_size + 1, dtype=dtype, device=device)
        return (mean + self.token_scale_offset.to(dtype)).clamp_min(0)

    def learner(self, dtype: torch.dtype) -> InnerLearner:
        """What the inner loop uses and does not change."""
        norm = self.inner_norm(dtype) if self.config.ttt_layer_norm_residual else None
        return InnerLearner(norm, self.config.ttt_use_bias)

    def initial_state(self, x: torch.Tensor, dtype: torch.dtype) -> LearnerState:
        """The learner's state before the first token of x [B, T, D]: the parameters, or zeros, the same for all."""
        weights = []
        for index, (ins, outs) in enumerate(pairwise(self.inner_sizes), start=1):
            for name, width in ((f"initial_weight_{index}", ins), (f"initial_bias_{index}", 1)):
                parameter = getattr(self, name, None)
                if parameter is None:
                    parameter = x.new_zeros(self.heads, width, outs)
                weights.append(parameter.to(dtype).repeat(x.shape[0], 1, 1, 1))
        return LearnerState(tuple(weights), None)

    def _rate(self, x: torch.Tensor, grid: MiniBatchGrid, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, G, N] learning rates; 0 in slots without a token."""
        if self.config.ttt_learn_learning_rate:
            rate = self.base_learning_rate * self.learning_rate_gate(x).to(dtype).sigmoid()
        else:
            rate = torch.full((*x.shape[:2], self.heads), self.base_learning_rate, dtype=dtype, device=x.device)
        rate = grid.place(rate)
        if grid.slot_mask is not None:
            rate = rate.masked_fill(~grid.slot_mask.unflatten(1, grid.shape)[..., None], 0.0)
        return rate.permute(0, 3, 1, 2)


MIXERS: dict[str, Any] = {
    "ttt_linear": TTTMixer,
    "ttt_mlp": TTTMixer,
    "ttt_kvb": TTTKVBMixer,
    "sliding_attention": TTTLayersAttention,
    "full_attention": TTTLayersAttention,
}


def _in_dtype(state: LearnerState, dtype: torch.dtype) -> LearnerState:
    sums = None if state.sums is None else tuple(tensor.to(dtype) for tensor in state.sums)
    return LearnerState(tuple(tensor.to(dtype) for tensor in state.weights), sums)
