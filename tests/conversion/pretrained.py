"""Small random models of transformers, of every kind that a warm start can begin with."""

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from ttt_e2e.conversion.transformer_layout import WarmStartSettings

from ..modeling.helpers import BATCH, VOCAB

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SETTINGS = WarmStartSettings(sliding_window=64, num_suffix_layers=2, mini_batch_size=BATCH, prime_intermediate_size=24)
THETA = {"rope_theta": 1e4}
LLAMA3 = THETA | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# The original length is shorter than the texts of these tests.
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = THETA | {"rope_type": "linear", "factor": 4.0}

SOURCES = {
    "llama": (LlamaConfig, {}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama, biases": (LlamaConfig, {"attention_bias": True}),
    "llama, wide heads": (LlamaConfig, {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "llama, llama3 rope": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama, yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "llama, yarn without original length": (
        LlamaConfig,
        {"rope_parameters": {k: v for k, v in YARN.items() if k[0] != "o"}, "max_position_embeddings": 16},
    ),
    "llama, linear rope": (LlamaConfig, {"rope_parameters": LINEAR}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral, sliding": (MistralConfig, {"sliding_window": 64}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, tied, yarn": (Qwen2Config, {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3, tied, biases": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
}


def random_source(config_class, changes, seed: int = 0) -> PreTrainedModel:
    """A random model of transformers whose norms and biases are random too."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**(SIZES | changes)), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit."""
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
