"""Parts of the decoder: RMSNorm, RoPE, gated MLP, attention, and the two kinds of blocks.

A block, with a residual around each line (sandwich norms when `post_norm`):

    x += post_attention_norm(attention(input_norm(x)))
    x += post_prime_norm(prime_mlp(pre_prime_norm(x)))          suffix blocks only
    x += post_feedforward_norm(mlp(pre_feedforward_norm(x)))

Axis letters: B batch rows, T new tokens, H earlier tokens, D hidden size, C channels of a head.
"""

import copy
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .attention import (
    AttentionInputs,
    BlockMasks,
    attend_in_blocks,
    attention_function,
    float64_device,
)
from .fast_weights import FastMatrix, FastWeights, linear
from .sinks import (
    KeysValues,
    Past,
    are_few,
    attend_with_sinks,
    grown_pair,
    join_pairs,
    with_new_sinks,
    with_sink_channels,
)
from .twice_differentiable import are_many, at_least_float32, inverse_rms, rms_normalize


class NewStates(NamedTuple):
    """Keys and values that attention leaves behind.

    Attributes:
        new: of the new tokens, each [B, key/value heads, T, C].
        joined: those of the window and the new ones, where attention has joined them anyway.
    """

    new: KeysValues
    joined: KeysValues | None = None


class TTTE2ERMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, in at least float32, returned in x's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, dtype = self.weight, at_least_float32(x.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return (rms_normalize(x.to(dtype), self.eps) * weight).to(x.dtype)
        if are_many(x):
            return (x * inverse_rms(x, self.eps) * weight).to(x.dtype)
        if x.dtype == weight.dtype == dtype:  # casts that change nothing would cost a third of it for a single token
            return torch.rms_norm(x, weight.shape, weight, self.eps)
        return torch.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), self.eps).to(x.dtype)


class TTTE2ERotaryEmbedding(nn.Module):
    """Cosines and sines of the RoPE angles, half-split layout. Angles are float64: exact at any position."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters.get("rope_type", "default")
        make = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inverse_frequencies, self.attention_scaling = make(config)
        self.inv_freq = nn.Buffer(inverse_frequencies, persistent=False)
        self.original_inv_freq = nn.Buffer(inverse_frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """theta^(-2i / head_dim) for i < head_dim / 2, and the scale of cosines and sines (1)."""
        channels = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device)
        return 1.0 / config.rope_parameters["rope_theta"] ** (channels / config.head_dim), 1.0

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> KeysValues:
        """position_ids [1 or B, T] -> cosines and sines, each [1 or B, 1, T, C], in `dtype` but at least float32.

        The sines of the first half have the sign that `rotate` gives them.
        """
        device = position_ids.device
        exact = float64_device(device)
        angles = position_ids[:, None, :, None].to(exact).double() * self.inv_freq.to(exact).double()
        dtype = at_least_float32(dtype)
        cosines, sines = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        cosines, sines = torch.cat([cosines, cosines], dim=-1), torch.cat([-sines, sines], dim=-1)
        return cosines.to(dtype).to(device), sines.to(dtype).to(device)


class RotaryEmbeddings(nn.ModuleDict):
    """`TTTE2ERotaryEmbedding` by layer type of attention; one for all where they do not differ."""

    def __init__(self, config):
        made: dict[int, TTTE2ERotaryEmbedding] = {}
        own = config.rope_of_layer_types()
        for rope in own.values():
            if id(rope) not in made:
                flat = copy.copy(config)  # as transformers, which fills in the frequencies of a loaded model, reads it
                flat.rope_parameters = rope
                made[id(rope)] = TTTE2ERotaryEmbedding(flat)
        super().__init__({kind: made[id(rope)] for kind, rope in own.items()})

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> dict[str, KeysValues]:
        """position_ids [1 or B, T] -> by layer type cosines and sines, as of `TTTE2ERotaryEmbedding`."""
        made = {rotary: rotary(position_ids, dtype) for rotary in self.children()}
        return {kind: made[rotary] for kind, rotary in self.items()}


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to x [B, heads, T, C]; computed in the angles' dtype, returned in x's.

    (a, b) -> (a cos - b sin, b cos + a sin)
    """
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines).to(x.dtype)


class TTTE2EMLP(nn.Module):
    """down(act(gate x) * up x); with fast weights the layers that learn have their row's difference added."""

    learning = slice(None)  # which of gate, up and down the inner loop updates, where this MLP learns

    def __init__(self, config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.sizes = (config.hidden_size, intermediate_size)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """[out, in] of the layers that learn; quantised and wrapped ones need not tell."""
        hidden, intermediate = self.sizes
        whole: tuple[tuple[int, int], ...] = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        return whole[self.learning]

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """The layers that learn, in the order of their fast weights."""
        return (self.gate_proj, self.up_proj, self.down_proj)[self.learning]

    def forward(self, x: torch.Tensor, matrices: tuple[FastMatrix, ...] | None = None) -> torch.Tensor:
        own: list[FastMatrix | None] = [None, None, None]
        if matrices is not None:
            own[self.learning] = matrices
        gate, up, down = own
        activated = self.act_fn(linear(self.gate_proj, x, gate)) * linear(self.up_proj, x, up)
        return linear(self.down_proj, activated, down)


class TTTE2EAttention(nn.Module):
    """Multi-head attention over earlier and new keys and values."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None
        self.num_sinks = 0 if self.sliding_window is None else config.num_sink_tokens
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        query_size, key_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = TTTE2ERMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = TTTE2ERMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: torch.Tensor, attention: AttentionInputs, past: Past | None
    ) -> tuple[torch.Tensor, NewStates, torch.Tensor | None]:
        """x [B, T, D] and earlier keys and values, each [B, key/value heads, tokens, C], rotated.

        Returns:
            The output [B, T, D], keys and values, and the weights [B, heads, T, H + T] (eager only).
        """
        query, key, value = (linear(projection, x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        output, states, weights = self.mix(query, key, value, attention, past)
        return linear(self.o_proj, output), states, weights

    def mix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention: AttentionInputs,
        past: Past | None,
    ) -> tuple[torch.Tensor, NewStates, torch.Tensor | None]:
        """As `forward`, from the projections [B, T, heads * C] to the output before its own, of the same shape."""
        shape = query.shape
        heads = (*shape[:-1], -1, self.head_dim)
        query = self.q_norm(query.view(heads)).transpose(1, 2)
        angles = attention.position_embeddings[self.layer_type]
        turned = rotate(query, *angles)
        key = rotate(self.k_norm(key.view(heads)).transpose(1, 2), *angles)
        new = (key, value.view(heads).transpose(1, 2))
        before, sinks = (None, None) if past is None else past.map(lambda states: states.to(key.dtype))
        parts = [pair for pair in (before, new) if pair is not None]
        mask = attention.masks[self.layer_type]
        if attention.sinks is not None:
            at_sinks = rotate(query, *attention.sinks.position_embeddings)
            sinks = with_new_sinks(sinks, new, attention.sinks.tokens_read, self.num_sinks)
            if isinstance(mask, torch.Tensor) and attention.implementation == "sdpa" and are_few(turned, value):
                joined = grown_pair(before, new)
                output = attend_with_sinks(turned, at_sinks, sinks, joined, mask, self.scaling)
                return output.transpose(1, 2).reshape(shape), NewStates(new, joined), None
            turned, sinks, parts = with_sink_channels(turned, at_sinks, sinks, parts)

        def attend(query, keys, values, mask):
            if attention.sinks is not None:
                keys, values = (torch.cat(pair, dim=2) for pair in zip(sinks, (keys, values), strict=True))
            return self._attend(attention.implementation, query, keys, values, mask)

        if isinstance(mask, BlockMasks):
            before = parts[0] if len(parts) > 1 else None
            output, weights = attend_in_blocks(lambda *seen: attend(*seen)[0], turned, parts[-1], before, mask), None
            joined = None
        elif attention.sinks is None:
            joined = grown_pair(before, new)
            output, weights = attend(turned, *joined, mask)
        else:  # with channels for sinks, which are not kept
            output, weights = attend(turned, *join_pairs(parts), mask)
            joined = None
        return output[..., : self.head_dim].reshape(shape), NewStates(new, joined), weights

    def _attend(self, implementation: str, query, keys, values, mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        attend = attention_function(implementation)
        return attend(self, query, keys, values, mask, scaling=self.scaling, sliding_window=self.sliding_window)


class NoAttention(nn.Module):
    """Stands in for attention in a model without it: adds nothing, and remembers keys and values of no channels."""

    sliding_window = 1

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.num_key_value_heads = config.num_key_value_heads

    def forward(
        self, x: torch.Tensor, attention: AttentionInputs, past: Past | None
    ) -> tuple[torch.Tensor, NewStates, None]:
        """x [B, T, D] -> zeros, empty keys and values [B, key/value heads, T, 0], and no weights."""
        empty = x.new_empty(x.shape[0], self.num_key_value_heads, x.shape[1], 0)
        return torch.zeros_like(x), NewStates((empty, empty)), None


class Block(nn.Module):
    """Attention and MLP, with what both kinds of blocks share."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        norm = lambda: TTTE2ERMSNorm(config.hidden_size, config.rms_norm_eps)  # noqa: E731
        optional_norm = norm if config.post_norm else nn.Identity
        self.self_attn = (TTTE2EAttention if config.use_attention else NoAttention)(config, layer_idx)
        self.mlp = TTTE2EMLP(config, config.intermediate_size)
        self.input_layernorm = norm() if config.use_attention else nn.Identity()
        self.post_attention_layernorm = optional_norm() if config.use_attention else nn.Identity()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = optional_norm()

    def attend(
        self, x: torch.Tensor, attention: AttentionInputs, past: Past | None
    ) -> tuple[torch.Tensor, NewStates, torch.Tensor | None]:
        output, states, weights = self.self_attn(self.input_layernorm(x), attention, past)
        return x + self.post_attention_layernorm(output), states, weights

    def feed_forward(self, x: torch.Tensor, matrices: tuple[FastMatrix, ...] | None = None) -> torch.Tensor:
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), matrices))

    def forward(
        self,
        x: torch.Tensor,
        attention: AttentionInputs | None,
        past: Past | None,
        matrices: tuple[FastMatrix, ...] | None = None,
        part: Literal["whole", "attention", "feed_forward"] = "whole",
    ) -> tuple[torch.Tensor, NewStates | None, torch.Tensor | None]:
        """x [B, T, D] -> the block's output [B, T, D], keys and values, the attention weights or None.

        Args:
            matrices: the fast weights of the block's inner MLP, in a suffix block.
            part: the half to compute. The attention of the first suffix block does not depend on any fast weight, so
                it runs once over a long text while the rest runs mini-batch by mini-batch.
        """
        states = weights = None
        if part != "feed_forward":
            x, states, weights = self.attend(x, attention, past)
        if part != "attention":
            x = self.feed_forward(x, matrices)
        return x, states, weights


class TTTE2EDecoderLayer(Block, GradientCheckpointingLayer):
    """A prefix block: the inner loop never touches it."""


class TTTE2ESuffixLayer(Block):
    """A suffix block: the inner loop updates its prime MLP (or its MLP, when `use_prime_mlp` is False)."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.use_prime_mlp = config.use_prime_mlp
        if config.use_prime_mlp:
            self.pre_prime_layernorm = TTTE2ERMSNorm(config.hidden_size, config.rms_norm_eps)
            self.prime_mlp = TTTE2EMLP(config, config.prime_intermediate_size)
            self.post_prime_layernorm = (
                TTTE2ERMSNorm(config.hidden_size, config.rms_norm_eps) if config.post_norm else nn.Identity()
            )
        self.inner_mlp.learning = config.inner_matrices

    @property
    def inner_mlp(self) -> TTTE2EMLP:
        """The MLP whose weights the inner loop updates."""
        return self.prime_mlp if self.use_prime_mlp else self.mlp

    def feed_forward(self, x: torch.Tensor, matrices: tuple[FastMatrix, ...] | None = None) -> torch.Tensor:
        if not self.use_prime_mlp:
            return super().feed_forward(x, matrices)
        x = x + self.post_prime_layernorm(self.prime_mlp(self.pre_prime_layernorm(x), matrices))
        return super().feed_forward(x)


def zero_fast_weights(layers: list[TTTE2ESuffixLayer], inputs: torch.Tensor) -> FastWeights:
    """Fast weights before any inner step: one zero difference per inner matrix, shared by all rows.

    Args:
        inputs: [B, T, D], what enters the inner loop. Of its device and dtype, but at least float32: weights may be
            quantised.
    """
    dtype = at_least_float32(inputs.dtype)
    shapes = [shape for layer in layers for shape in layer.inner_mlp.shapes]
    tensors = (torch.zeros(1, *shape, dtype=dtype, device=inputs.device) for shape in shapes)
    return FastWeights(tuple(tensors), (0,) * inputs.shape[0])
