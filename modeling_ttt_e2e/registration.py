"""Make model classes known to transformers: Auto classes, Trainer's list of language models, and the module itself."""

import sys

import transformers.processing_utils  # noqa: F401  (it replaces sys.modules["transformers"], so it must come first)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register(model_type: str, config_class: type, model_class: type, causal_lm_class: type) -> None:
    """Register one architecture under its `model_type`; registering twice is harmless."""
    AutoConfig.register(model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, causal_lm_class, exist_ok=True)
    # Trainer's label smoothing shifts labels, and servers accept a model, only when the class is listed here.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_type, causal_lm_class.__name__)
    # `transformers serve` looks the architecture up as an attribute of the package.
    setattr(sys.modules["transformers"], causal_lm_class.__name__, causal_lm_class)
