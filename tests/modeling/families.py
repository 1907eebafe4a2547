"""Every family of models in every mode, small, random, and reading across all of its borders in `LENGTH` tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, set_seed

from ttt_e2e import (
    RecurrentHybridConfig,
    RecurrentHybridForCausalLM,
    RecurrentHybridModel,
    TTTE2ECache,
    TTTE2EConfig,
    TTTE2EForCausalLM,
    TTTE2EModel,
    TTTLayersCache,
    TTTLayersConfig,
    TTTLayersForCausalLM,
    TTTLayersModel,
)

from . import recurrent, ttt_layers
from .helpers import random_ids, small_model

LENGTH = 27
IDS = random_ids(3, LENGTH)
NEW = 11
ENDLESS = {"eos_token_id": None, "tie_word_embeddings": False, "initializer_range": 0.3}
TTT_E2E = {
    "learning": {},
    "learning-off": {"test_time_training": False},
    "attention-free": {"use_attention": False},
    "inner-mlp": {"use_prime_mlp": False},
    "sinks": {"num_sink_tokens": 3},
    "inner-down": {"inner_projections": "down"},
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        a_weight: the name of a parameter that every mode of `some_mode` has, for a test that leaves it out.
    """

    model_type: str
    config_class: type
    base_class: type
    causal_lm_class: type
    cache_class: type
    some_mode: str
    a_weight: str


@dataclass(frozen=True)
class Kind:
    """A family in one of its modes."""

    family: Family
    mode: str
    make: Callable[..., PreTrainedModel]
    tolerance: dict[str, float]

    def model(self, dtype: torch.dtype = torch.float64, **changes) -> PreTrainedModel:
        """A random model in evaluation mode that ends no text by itself; `changes` are configuration fields."""
        return self.make(self.mode, dtype, **changes)

    def fresh(self, **changes) -> PreTrainedModel:
        """A float32 model as its configuration makes it, in training mode."""
        config = self.model(torch.float32, **changes).config
        set_seed(0)
        return self.family.causal_lm_class(config)


def _ttt_e2e(mode: str, dtype: torch.dtype, **changes) -> TTTE2EForCausalLM:
    return small_model(dtype, **ENDLESS | TTT_E2E[mode] | changes)


FAMILIES = {
    "ttt_e2e": Family(
        "ttt_e2e",
        TTTE2EConfig,
        TTTE2EModel,
        TTTE2EForCausalLM,
        TTTE2ECache,
        "learning",
        "model.layers.3.prime_mlp.up_proj.weight",
    ),
    "ttt_layers": Family(
        "ttt_layers",
        TTTLayersConfig,
        TTTLayersModel,
        TTTLayersForCausalLM,
        TTTLayersCache,
        "mamba-backbone",
        "model.layers.0.ttt.initial_weight_1",
    ),
    "recurrent_hybrid": Family(
        "recurrent_hybrid",
        RecurrentHybridConfig,
        RecurrentHybridModel,
        RecurrentHybridForCausalLM,
        DynamicCache,
        "everything",
        "model.layers.0.linear_attn.dt_bias",
    ),
}
KINDS = {
    **{f"ttt-e2e {mode}": Kind(FAMILIES["ttt_e2e"], mode, _ttt_e2e, ttt_layers.CLOSE) for mode in TTT_E2E},
    **{
        f"ttt-layers {mode}": Kind(FAMILIES["ttt_layers"], mode, ttt_layers.layers_model, ttt_layers.CLOSE)
        for mode in ttt_layers.MIXES
    },
    **{
        f"hybrid {mode}": Kind(FAMILIES["recurrent_hybrid"], mode, recurrent.hybrid, recurrent.tolerance(mode))
        for mode in recurrent.MIXES
    },
}


def write(model, ids, **arguments):
    """New ids only; the padding id is never written."""
    set_seed(0)
    settings = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0]}
    return model.generate(ids, **settings | arguments)[:, ids.shape[1] :]
