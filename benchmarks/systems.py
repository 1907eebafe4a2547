"""The models that are timed beside each other: stock transformers' decoder, and ours with learning off and on.

The stock decoder is Qwen3, which has what ours has but for sandwich norms and prime MLPs. Its MLPs are wider by the
share of the prime MLPs, so that all models have about as many parameters.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from .. import TTTE2EConfig, TTTE2EForCausalLM

STOCK_WINDOW, STOCK_FULL = "stock, sliding window", "stock, full attention"
OFF, ON = "learning off", "learning on"
SYSTEMS = (STOCK_WINDOW, STOCK_FULL, OFF, ON)


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
    """A system with random weights, float32."""
    torch.manual_seed(0)
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
    if system in (OFF, ON):
        config = TTTE2EConfig(
            **shared,
            intermediate_size=sizes.intermediate_size,
            num_suffix_layers=sizes.num_suffix_layers,
            mini_batch_size=sizes.mini_batch_size,
        )
        return TTTE2EForCausalLM(config).to(device)  # type: ignore[arg-type]  # a wrapped method
    slides = system == STOCK_WINDOW
    share = 1 + sizes.num_suffix_layers / sizes.num_hidden_layers
    stock = Qwen3Config(
        **shared,
        intermediate_size=round(sizes.intermediate_size * share),
        num_key_value_heads=sizes.num_attention_heads,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        use_sliding_window=slides,
        layer_types=["sliding_attention" if slides else "full_attention"] * sizes.num_hidden_layers,
    )
    return Qwen3ForCausalLM(stock).to(device)  # type: ignore[arg-type]


def arguments(system: str) -> dict[str, bool]:
    """What a call of the system's model is told."""
    return {"test_time_training": system == ON} if system in (OFF, ON) else {}
