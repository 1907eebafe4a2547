"""Mixers of a [`TTTLayersModel`]: TTT-Linear, TTT-MLP and attention, all with one calling convention.

A mixer is a module made by `Mixer(config, layer_idx)` and called as `mixer(x, call, state)`:

    x      [B, T, D] tokens, each row's own aligned left; what stands right of a row's last token means nothing
    call   [`MixerCall`], what all blocks of one call share
    state  what the same block returned for the tokens before, None at the start: nested tuples of tensors with the
           rows on the first axis (None allowed), never written in place, of a size that does not grow without bound
    ->     output [B, T, D], the state after each row's last token, attention weights or None

A mixer with attention inside also has `history_columns(state)`, how many earlier keys its state holds. `MIXERS` names
the classes. Axis letters: B batch rows, T tokens of the call, D hidden size, H heads, C channels of a head,
G mini-batches, N their slots.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .attention import float64_device
from .context import take_last
from .mini_batch_grid import MiniBatchGrid
from .ttt_attention_mixer import MixerCall, TTTLayersAttention
from .ttt_kvb_mixer import TTTKVBMixer
from .ttt_linear_mlp import NORM_EPS, InnerLearner, LearnerState, Views, default_checkpoint_every, learn_slots
from .twice_differentiable import at_least_float32


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
        counts: real tokens per row.

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


class TTTHeadNorm(nn.Module):
    """Weight and bias [H, C] of the LayerNorm within f, one per head; `ttt_linear_mlp` computes it.

    It is called for them, so that whatever moves parameters when a module is called (offloading, sharding) sees it.
    """

    def __init__(self, heads: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, channels))
        self.bias = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias as [H, 1, C]."""
        return self.weight.to(dtype).unsqueeze(1), self.bias.to(dtype).unsqueeze(1)


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
        if grid.real is not None:
            rate = rate.masked_fill(~grid.real.unflatten(1, grid.shape)[..., None], 0.0)
        return rate.permute(0, 3, 1, 2)


MIXERS: dict[str, Any] = {
    "ttt_linear": TTTMixer,
    "ttt_mlp": TTTMixer,
    "ttt_kvb": TTTKVBMixer,
    "sliding_attention": TTTLayersAttention,
    "full_attention": TTTLayersAttention,
}


def rotation_angles(positions: torch.Tensor, channels: int, theta: float) -> torch.Tensor:
    """positions [...] -> RoPE angles [..., channels / 2], float64, on a device that has it."""
    device = float64_device(positions.device)
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    return positions[..., None].to(device).double() * theta**-exponents


def rotate_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn the channels (2i, 2i + 1) of x [B, H, G, N, C] by angles [1 or B, G, N, C / 2]."""
    cosines, sines = (turn.to(x.dtype).to(x.device).unsqueeze(1) for turn in (angles.cos(), angles.sin()))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1).flatten(-2)


def _in_dtype(state: LearnerState, dtype: torch.dtype) -> LearnerState:
    sums = None if state.sums is None else tuple(tensor.to(dtype) for tensor in state.sums)
    return LearnerState(tuple(tensor.to(dtype) for tensor in state.weights), sums)
