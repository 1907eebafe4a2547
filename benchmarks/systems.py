"""The models that are timed beside each other: stock transformers' decoder, and ours with learning off and on.

The stock decoder is Qwen3, which has what ours has but for sandwich norms and prime MLPs. Its MLPs are wider by the
share of the prime MLPs, so that all models have about as many parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from .. import TTTE2EConfig, TTTE2EForCausalLM

STOCK_WINDOW, STOCK_FULL = "stock, sliding window", "stock, full attention"
OFF, ON = "learning off", "learning on"


@dataclass(frozen=True)
class TimedSystem:
    """A measured system.

    Attributes:
        stock: transformers' Qwen3, or our model.
        changes: of the configuration. told: arguments of a call of the model.
    """

    stock: bool
    changes: Mapping[str, Any]
    told: Mapping[str, Any]


SYSTEMS = {
    STOCK_WINDOW: TimedSystem(True, {"layer_types": "sliding_attention"}, {}),
    STOCK_FULL: TimedSystem(True, {"layer_types": "full_attention"}, {}),
    OFF: TimedSystem(False, {}, {"test_time_training": False}),
    ON: TimedSystem(False, {}, {"test_time_training": True}),
}
# What a GPU may have besides.
GPU_SYSTEMS = SYSTEMS | {
    "stock, full attention, flash-attn": TimedSystem(
        True, {"layer_types": "full_attention", "attn_implementation": "flash_attention_2"}, {}
    ),
    "learning on, Triton": TimedSystem(False, {"inner_attention": "triton"}, {"test_time_training": True}),
    "learning on, first order": TimedSystem(False, {"meta_gradient": "first_order"}, {"test_time_training": True}),
}


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the measured models; the names are those of `TTTE2EConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_suffix_layers: int
    mini_batch_size: int
    sliding_window: int


def build(system: str, sizes: ModelSizes, device: str) -> PreTrainedModel:
    """A system of `GPU_SYSTEMS` with random weights, float32."""
    torch.manual_seed(0)
    known = GPU_SYSTEMS[system]
    changes = dict(known.changes)
    shared: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "sliding_window": sizes.sliding_window,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not known.stock:
        config = TTTE2EConfig(
            **shared,
            **changes,
            intermediate_size=sizes.intermediate_size,
            num_suffix_layers=sizes.num_suffix_layers,
            mini_batch_size=sizes.mini_batch_size,
        )
        return TTTE2EForCausalLM(config).to(device)  # type: ignore[arg-type]  # a wrapped method
    kind = changes.pop("layer_types")
    share = 1 + sizes.num_suffix_layers / sizes.num_hidden_layers
    stock = Qwen3Config(
        **shared,
        intermediate_size=round(sizes.intermediate_size * share),
        num_key_value_heads=sizes.num_attention_heads,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        use_sliding_window=kind == "sliding_attention",
        layer_types=[kind] * sizes.num_hidden_layers,
        **changes,
    )
    return Qwen3ForCausalLM(stock).to(device)  # type: ignore[arg-type]


def arguments(system: str) -> Mapping[str, Any]:
    """What a call of the system's model is told."""
    return GPU_SYSTEMS[system].told
