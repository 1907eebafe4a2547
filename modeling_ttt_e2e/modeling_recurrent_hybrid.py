"""The recurrent baselines: a decoder whose blocks mix tokens by attention, Mamba 2 or Gated DeltaNet.

Attention, MLP and RMSNorm are those of Qwen3, the recurrent mixers those of Mamba 2 and OLMo Hybrid, all from
transformers: pure PyTorch, or fused kernels where mamba-ssm, causal-conv1d and flash-linear-attention are installed.

A block, with a residual around each line (`post_` norms only with `post_norm`):

    x += post_attention_norm(mixer(input_norm(x)))
    x += post_feedforward_norm(mlp(pre_feedforward_norm(x)))
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.utils.output_capturing import capture_outputs

from .attention import float64_device
from .base_causal_lm import BaseGenerationMixin, BaselineCausalLM
from .checks import (
    accept_earlier_cache_names,
    check_embeddings,
    check_extra_arguments,
    check_flags,
    check_ids,
    check_positions,
    check_something_to_read,
    one_input,
    read_attention_mask,
)
from .configuration_recurrent_hybrid import RecurrentHybridConfig
from .recurrent_inputs import (
    RecurrentMask,
    check_one_document,
    check_packing,
    check_states,
    count_positions,
    create_recurrent_mask,
    group_tokens,
    mix_tokens,
)

# What the mixers know of packed documents, which only their fused kernels keep apart.
PACKING_ARGUMENTS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What transformers' `capture_outputs` takes from the keyword arguments.
CAPTURED_OUTPUTS = ("output_hidden_states", "output_attentions")
MASKS: dict[str, Callable] = {
    "sliding_attention": create_sliding_window_causal_mask,
    "full_attention": create_causal_mask,
    "linear_attention": create_recurrent_mask,
}


class RecurrentHybridRotaryEmbedding(Qwen3RotaryEmbedding):
    """RoPE with float64 angles: exact at any position, where float32 loses 0.01 rad at 128K tokens."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [1 or batch, length] -> cosines and sines [1 or batch, length, head_dim] in x's dtype."""
        exact = float64_device(x.device)
        angles = position_ids[..., None].to(exact).double() * self.inv_freq.to(exact).double()
        angles = torch.cat([angles, angles], dim=-1)
        cosines, sines = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cosines.to(x.dtype).to(x.device), sines.to(x.dtype).to(x.device)


class RecurrentHybridDecoderLayer(GradientCheckpointingLayer):
    """One block; its mixer is `self_attn`, `mamba` or `linear_attn`, named as elsewhere in transformers."""

    def __init__(self, config: RecurrentHybridConfig, layer_idx: int):
        super().__init__()
        norm = partial(Qwen3RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        optional_norm = norm if config.post_norm else nn.Identity
        self.mixer_type = config.mixer_types[layer_idx]
        if self.mixer_type == "mamba2":
            self.mamba = Mamba2Mixer(config.mamba2_config(), layer_idx)
        elif self.mixer_type == "gated_delta_net":
            self.linear_attn = OlmoHybridGatedDeltaNet(config, layer_idx)  # type: ignore[arg-type]  # has its fields
        else:
            self.self_attn = Qwen3Attention(config, layer_idx)  # type: ignore[arg-type]  # its fields are there
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = optional_norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = optional_norm()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: RecurrentMask = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """[batch, length, hidden_size] -> the same shape."""
        x = self.input_layernorm(hidden_states)
        if self.mixer_type == "mamba2":
            x = mix_tokens(self.mamba, x, cache, attention_mask, **kwargs)
        elif self.mixer_type == "gated_delta_net":
            x = mix_tokens(self.linear_attn, x, cache, attention_mask, **kwargs)
        else:
            x, _ = self.self_attn(
                x,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                cache=cache,
                **kwargs,
            )
        hidden_states = hidden_states + self.post_attention_layernorm(x)
        x = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.post_feedforward_layernorm(x)


class RecurrentHybridPreTrainedModel(PreTrainedModel):
    config: RecurrentHybridConfig
    config_class = RecurrentHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentHybridDecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True  # a recurrent state cannot be rolled back, as assisted decoding would
    _can_record_outputs = {"hidden_states": RecurrentHybridDecoderLayer, "attentions": Qwen3Attention}
    # Decays, skips and step sizes of the recurrent mixers: to pull them to zero is not to make them simpler.
    no_weight_decay = ("A_log", "D", "dt_bias")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The parameters that only the recurrent mixers have, as Mamba 2 and OLMo Hybrid initialise them."""
        super()._init_weights(module)
        if isinstance(module, Mamba2Mixer):
            module.init_mamba2_weights()
            init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
            init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
        elif isinstance(module, OlmoHybridGatedDeltaNet):
            config = self.config
            decay = torch.empty_like(module.A_log).uniform_(config.linear_a_log_min, config.linear_a_log_max)
            init.copy_(module.A_log, decay.log())
            low, high = math.log(config.linear_dt_min), math.log(config.linear_dt_max)
            step = torch.empty_like(module.dt_bias).uniform_(low, high).exp().clamp_min(config.linear_dt_init_floor)
            init.copy_(module.dt_bias, step + torch.log(-torch.expm1(-step)))  # softplus turns it into the step


class RecurrentHybridModel(RecurrentHybridPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: RecurrentHybridConfig):
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            RecurrentHybridDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RecurrentHybridRotaryEmbedding(config)  # type: ignore[arg-type]  # its fields are there
        self.gradient_checkpointing = False
        self.post_init()

    @accept_earlier_cache_names
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Read tokens.

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, read before + length], 0 for padding, anywhere, so that a batch may be
                continued with turns that are padded on the left. Recurrent blocks and full attention read each row as
                if it stood alone; a sliding window counts positions, padding included, as in models of transformers.
                (When compiled: on the left of a first call, or on the right of a last one.)
            position_ids: [1 or batch, length]; None counts each row's tokens.
            cache: a `DynamicCache(config=model.config)` to go on from, updated in place.
            inputs_embeds: [batch, length, hidden_size] instead of `input_ids`.
            use_cache: return the cache (default: `config.use_cache` except when training).
            kwargs: `output_hidden_states`, `output_attentions`; packed documents need `seq_idx` and `cu_seq_lens_q`,
                and fused kernels.

        Raises:
            TypeError: unknown arguments.
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; a cache of another model; packed documents
                that would leak through the recurrent state.
        """
        check_extra_arguments(kwargs, known=(*PACKING_ARGUMENTS, *CAPTURED_OUTPUTS))
        packing = {name: kwargs[name] for name in PACKING_ARGUMENTS if kwargs.get(name) is not None}
        check_flags(use_cache=use_cache)
        one_input(input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not torch.compiler.is_compiling():
            packed = {"seq_idx", "cu_seq_lens_q"} <= packing.keys()
            self._check_values(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, packed)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen, length = 0 if cache is None else cache.get_seq_length(), inputs_embeds.shape[1]
            position_ids = count_positions(attention_mask, seen, length)
            if position_ids is None:
                position_ids = torch.arange(seen, seen + length, device=inputs_embeds.device)[None]
        masks = attention_mask
        if not isinstance(masks, dict):  # `generate` prepares them itself when it compiles the forward pass
            arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "cache": cache,
                "position_ids": position_ids,
            }
            masks = {name: MASKS[name](**arguments) for name in set(self.config.layer_types)}
        if "linear_attention" in masks and not torch.compiler.is_compiling():
            groups = group_tokens(masks["linear_attention"], cache)
            check_packing(isinstance(groups, list), packing)
            masks = {**masks, "linear_attention": groups}

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                cache=cache,
                **packing,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache if use_cache else None)

    def _check_values(
        self, input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache: bool, packed: bool
    ) -> None:
        """Check what a compiled forward pass cannot look at; masks that transformers has prepared pass as they are.

        Args:
            packed: the recurrent blocks are told where packed documents begin.
        """
        if inputs_embeds is None:
            check_ids(input_ids, self.config.vocab_size)
        else:
            check_embeddings(inputs_embeds, self.config.hidden_size)
        check_states(cache, self.config.layer_types)
        shape = tuple((input_ids if inputs_embeds is None else inputs_embeds).shape[:2])
        token_mask = None
        if (
            attention_mask is not None
            and not isinstance(attention_mask, dict)
            and getattr(attention_mask, "ndim", 2) != 4
        ):
            token_mask = read_attention_mask(attention_mask, shape, 0 if cache is None else int(cache.get_seq_length()))
            check_something_to_read(token_mask, goes_on=use_cache or cache is not None)
        if position_ids is not None:
            position_ids = check_positions(position_ids, token_mask, shape)
            if "linear_attention" in self.config.layer_types and not packed:
                check_one_document(position_ids, token_mask)


class RecurrentHybridForCausalLM(BaselineCausalLM, RecurrentHybridPreTrainedModel, BaseGenerationMixin):
    """The decoder with logits, the loss and `generate`."""

    decoder_class = RecurrentHybridModel


__all__ = ["RecurrentHybridForCausalLM", "RecurrentHybridModel", "RecurrentHybridPreTrainedModel"]
