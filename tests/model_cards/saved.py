"""Saved models to export: small, random, with a tokenizer."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..modeling.helpers import small_model
from ..modeling.recurrent import hybrid
from ..modeling.tiny_tokenizer import byte_level_tokenizer
from ..modeling.ttt_layers import layers_model

KINDS = ("ttt_e2e", "recurrent_hybrid", "ttt_layers")


def model_of(kind: str, **changes) -> PreTrainedModel:
    """A model whose vocabulary is that of `byte_level_tokenizer`."""
    changes = {"vocab_size": len(byte_level_tokenizer()), **changes}
    if kind == "ttt_e2e":
        return small_model(initializer_range=0.3, **changes)
    if kind == "recurrent_hybrid":
        return hybrid("everything", torch.float32, **changes)
    mixers = ["ttt_linear", "ttt_mlp", "ttt_kvb", "sliding_attention"]
    return layers_model("everything", torch.float32, mixer_types=mixers, ttt_kvb_num_heads=2, **changes)


def saved_model(folder: Path, kind: str = "ttt_e2e", **changes) -> Path:
    """The folder, with a model that writes no special tokens, and the tokenizer."""
    model = model_of(kind, **changes)
    model.generation_config.suppress_tokens = [0, 1, 2]
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder
