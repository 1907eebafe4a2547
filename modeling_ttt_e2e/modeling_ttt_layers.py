"""TTT-Linear, TTT-MLP (arXiv 2407.04620) and TTT-KVB as transformers models, alone or mixed with attention blocks.

A block, with a residual around each line (the first line only with `ttt_pre_conv`, post norms only with `post_norm`):

    x += conv(conv_norm(x))
    x += post_attention_norm(mixer(input_norm(x)))
    x += post_feedforward_norm(mlp(pre_feedforward_norm(x)))

Axis letters: B batch rows, N positions of the call, T tokens (each row's own moved to the left), D hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from .attention import AttentionInputs, segment_masks
from .base_causal_lm import BaseGenerationMixin, BaselineCausalLM
from .cache_ttt_layers import TTTLayersCache
from .checks import (
    accept_earlier_cache_names,
    asked_or,
    check_cache,
    check_embeddings,
    check_extra_arguments,
    check_flags,
    check_ids,
    check_last_is_token,
    check_positions,
    check_something_to_read,
    one_input,
    read_attention_mask,
)
from .configuration_decoder import ATTENTION_TYPES
from .configuration_ttt_layers import INNER_LEARNERS, TTTLayersConfig
from .layers import TTTE2EMLP, RotaryEmbeddings, TTTE2ERMSNorm
from .outputs import AttentionWriter, PositionWriter, attention_writers
from .tokens import MiniBatchGrid, Segment, Tokens, added
from .ttt_mixers import MIXERS, MixerCall, TTTKVBMixer, TTTMixer, causal_convolution, make_convolution

# Tokens that are read at once without gradients, so that memory grows with the outputs alone.
SEGMENT_TOKENS = 2048
NO_PREFIX = (
    " (Prefix tuning of PEFT makes caches of keys and values, which not all blocks have: use LoRA or prompt tuning.)"
)


class TTTLayersDecoderLayer(GradientCheckpointingLayer):
    """One block; its mixer is `self_attn` (attention) or `ttt`."""

    def __init__(self, config: TTTLayersConfig, layer_idx: int):
        super().__init__()
        norm = partial(TTTE2ERMSNorm, config.hidden_size, config.rms_norm_eps)
        optional_norm = norm if config.post_norm else nn.Identity
        self.mixer_type = config.mixer_types[layer_idx]
        mixer = MIXERS[self.mixer_type](config, layer_idx)
        if self.mixer_type in ATTENTION_TYPES:
            self.self_attn = mixer
        else:
            self.ttt = mixer
        self.has_convolution = config.ttt_pre_conv and self.mixer_type in INNER_LEARNERS
        if self.has_convolution:
            self.conv_norm = norm()
            self.conv = make_convolution(config)
        self.mlp = TTTE2EMLP(config, config.intermediate_size)
        self.input_layernorm = norm()
        self.post_attention_layernorm = optional_norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = optional_norm()

    @property
    def mixer(self) -> nn.Module:
        return self.self_attn if self.mixer_type in ATTENTION_TYPES else self.ttt

    def forward(self, x: torch.Tensor, call: MixerCall, state: tuple | None) -> tuple[torch.Tensor, tuple, object]:
        """x [B, T, D] -> the same shape, the block's state after it, and attention weights or None.

        The state is a pair: the last inputs of the block's convolution (None without), and the mixer's state.
        """
        past, mixer_state = (None, None) if state is None else state
        last = None
        if self.has_convolution:
            (added,), last = causal_convolution((self.conv,), self.conv_norm(x), past, call.counts)
            x = x + added
        mixed, mixer_state, weights = self.mixer(self.input_layernorm(x), call, mixer_state)
        x = x + self.post_attention_layernorm(mixed)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x, (last, mixer_state), weights


class TTTLayersPreTrainedModel(PreTrainedModel):
    config: TTTLayersConfig
    config_class = TTTLayersConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TTTLayersDecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_compile_fullgraph = False
    _is_stateful = True  # what was learned cannot be rolled back, as assisted decoding would
    # Blocks see tokens, not positions, so that hooks would record them in another layout.
    _can_record_outputs = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Parameters of TTT blocks as the official codes (of TTT layers, and of LaCT for TTT-KVB) initialise them."""
        super()._init_weights(module)
        if isinstance(module, TTTKVBMixer):
            for name in ("initial_gate", "initial_up", "initial_down"):
                parameter = getattr(module, name)
                init.normal_(parameter, mean=0.0, std=parameter.shape[-1] ** -0.5)
            for name in module.views:
                init.ones_(getattr(module, f"{name}_scale"))
                init.zeros_(getattr(module, f"{name}_offset"))
        elif isinstance(module, nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, TTTMixer):
            for name, parameter in module.named_parameters():
                if name.startswith("initial_weight") or name == "learning_rate_gate.weight":
                    init.normal_(parameter, mean=0.0, std=0.02)
                elif name.startswith("initial_bias") or name == "token_scale_offset":
                    init.zeros_(parameter)
                elif name.startswith("inner_norm"):
                    (init.ones_ if name.endswith("weight") else init.zeros_)(parameter)


@dataclass
class _Reading:
    """What a call goes on from: tokens per row, and each block's state."""

    tokens: tuple[int, ...]
    states: tuple


class TTTLayersModel(TTTLayersPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: TTTLayersConfig):
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TTTLayersDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = TTTE2ERMSNorm(config.hidden_size, config.rms_norm_eps)
        if set(config.layer_types) & set(ATTENTION_TYPES):
            self.rotary_emb = RotaryEmbeddings(config)
        self.gradient_checkpointing = False
        self.post_init()

    @accept_earlier_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: TTTLayersCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Read tokens.

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, length] or [batch, read before + length], 0 for padding, anywhere.
            position_ids: [1 or batch, length], for the RoPE of attention blocks, growing along each row's tokens; None
                counts them. TTT blocks always count tokens.
            cache: a [`TTTLayersCache`] to go on from; updated unless `use_cache=False`.
            inputs_embeds: [batch, length, hidden_size] instead of `input_ids`.
            use_cache: return the cache (default: `config.use_cache` except when training, or when one is given).
            output_attentions: weights of the attention blocks, in their order.

        Returns:
            `last_hidden_state` [batch, length, hidden_size], zero at padding; `hidden_states`: the embeddings and
            the output of every block, the last one after the final norm.

        Raises:
            ValueError, TypeError: an argument that cannot be read, before any work; nothing is changed.
        """
        check_extra_arguments(kwargs)
        check_flags(use_cache=use_cache, output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        shape = one_input(input_ids, inputs_embeds)
        if inputs_embeds is None:
            check_ids(input_ids, self.config.vocab_size)
        else:
            check_embeddings(inputs_embeds, self.config.hidden_size)
        check_cache(cache, TTTLayersCache, shape[0], self.config, NO_PREFIX)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if cache is None or not cache.is_initialized:
            before, states, starts, read = (0,) * shape[0], (None,) * len(self.layers), (0,) * shape[0], 0
        else:
            before, states, starts, read = cache.tokens, cache.states, cache.next_positions, cache.columns
        token_mask = read_attention_mask(attention_mask, shape, read)
        if position_ids is not None:
            position_ids = check_positions(position_ids, token_mask, shape, starts)
        check_something_to_read(token_mask, goes_on=use_cache or cache is not None)
        tokens = Tokens.of(None, inputs_embeds, None, position_ids, token_mask, starts)
        keep_layers = asked_or(output_hidden_states, self.config.output_hidden_states)
        keep_weights = asked_or(output_attentions, self.config.output_attentions)
        hidden, layers, writers = PositionWriter(tokens), [], None
        if keep_layers:
            layers = [PositionWriter(tokens) for _ in self.layers]
        if keep_weights:
            writers = attention_writers(self.config, tokens, attention_mask, before, read)
        reading = _Reading(before, states)
        for segment in self._segments(tokens):
            last, inputs = self._read(segment, reading, writers)
            hidden.add(last, segment)
            for writer, state in zip(layers, inputs, strict=False):
                writer.add_chunks([state], segment)
        if use_cache:
            cache = TTTLayersCache(self.config) if cache is None else cache
            cache.store(reading.states, reading.tokens, tokens.next_positions, shape[1])
        last = hidden.result()
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            cache=cache if use_cache else None,
            hidden_states=(*(writer.followed() for writer in layers), last) if keep_layers else None,
            attentions=None if writers is None else tuple(writer.result() for writer in writers.values()),
        )

    def _segments(self, tokens: Tokens) -> Iterator[Segment]:
        """All tokens of a call, at once with gradients and segment by segment without."""
        size, mini_batch = None, self.config.mini_batch_size
        if not torch.is_grad_enabled():
            size = mini_batch * max(1, SEGMENT_TOKENS // mini_batch)
        [whole] = tokens.stretches(False, None, 0)
        return tokens.segments(whole, (0,) * tokens.rows, mini_batch, size, True)

    def _read(
        self, segment: Segment, reading: _Reading, writers: dict[int, AttentionWriter] | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read a segment into `reading`.

        Returns:
            Hidden states [B, T, D] after the final norm, and those before every block.
        """
        x, states, inputs = segment.embeddings, [], []
        call = self._mixer_call(reading, segment, writers is not None)
        for index, layer in enumerate(self.layers):
            inputs.append(x)
            x, state, weights = layer(x, call, reading.states[index])
            states.append(state)
            if writers is not None and index in writers:
                writers[index].add(weights, segment)
        reading.states, reading.tokens = tuple(states), added(reading.tokens, segment.counts)
        return self.norm(x), inputs

    def _mixer_call(self, reading: _Reading, segment: Segment, weights: bool) -> MixerCall:
        x, counts, positions = segment.embeddings, segment.counts, segment.position_ids
        grid = MiniBatchGrid.of(reading.tokens, counts, x.shape[1], self.config.mini_batch_size, x.device)
        attention = None
        if hasattr(self, "rotary_emb"):
            implementation = "eager" if weights else self.config._attn_implementation
            embeddings = self.rotary_emb(positions, self.dtype)
            attention = AttentionInputs(embeddings, self._masks(reading, x, implementation, weights), implementation)
        checkpointing = self.gradient_checkpointing and self.training
        return MixerCall(reading.tokens, counts, grid, attention, checkpointing)

    def _masks(self, reading: _Reading, x: torch.Tensor, implementation: str, weights: bool) -> dict:
        """Masks by the kind of attention; blocks of a kind have equally many earlier keys."""
        masks = {}
        for index, layer_type in enumerate(self.config.layer_types):
            if layer_type in masks or layer_type not in ATTENTION_TYPES:
                continue
            state = reading.states[index]
            num_past = 0 if state is None else self.layers[index].mixer.num_past(state[1])
            window = self.config.sliding_window if layer_type == "sliding_attention" else None
            sizes = (num_past, x.shape[1], reading.tokens)
            masks[layer_type] = segment_masks(implementation, window, *sizes, x.device, weights)
        return masks


class TTTLayersForCausalLM(BaselineCausalLM, TTTLayersPreTrainedModel, BaseGenerationMixin):
    """The decoder with logits, the loss and `generate`."""

    decoder_class = TTTLayersModel
    own_cache_class = TTTLayersCache

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Refusals of what the cache cannot serve, before any work."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation={kind!r}` is not possible: the cache holds what was learned. Leave it out."
            )
        check_last_is_token(model_kwargs.get("attention_mask"))
        check_cache(model_kwargs.get("cache"), TTTLayersCache, None, self.config, NO_PREFIX)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """None: the model counts each row's own tokens, also across calls and padding."""
        return None


__all__ = ["TTTLayersForCausalLM", "TTTLayersModel", "TTTLayersPreTrainedModel"]
