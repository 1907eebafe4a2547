"""Make model classes known to transformers: Auto classes, its lists by task, and the module itself."""

import sys

import transformers.processing_utils  # noqa: F401  (it replaces sys.modules["transformers"], so it must come first)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

# Trainer's label smoothing shifts labels, servers accept a model, and pipelines do not complain about it, only when the
# class is listed under its task.
TASKS = {
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForQuestionAnswering: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}

# What has been registered, by model type.
CONFIGURATIONS: dict[str, type] = {}


def register(config_class: type, model_class: type, task_classes: dict[type, type]) -> None:
    """Register one architecture under its `model_type`; registering twice is harmless.

    Args:
        task_classes: the classes with a head, by their Auto class.
    """
    CONFIGURATIONS[config_class.model_type] = config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    for auto_class, task_class in task_classes.items():
        auto_class.register(config_class, task_class, exist_ok=True)
        TASKS[auto_class].setdefault(config_class.model_type, task_class.__name__)
        # `transformers serve` looks the architecture up as an attribute of the package.
        setattr(sys.modules["transformers"], task_class.__name__, task_class)
