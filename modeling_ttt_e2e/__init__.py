"""End-to-End Test-Time Training for transformers: importing this package registers the Auto classes."""

from .transformers_release import OLDEST_TRANSFORMERS  # noqa: F401  (first: an older release lacks names below)

# isort: split
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_ttt_e2e import TTTE2ECache
from .cache_ttt_layers import TTTLayersCache
from .configuration_recurrent_hybrid import RecurrentHybridConfig
from .configuration_ttt_e2e import TTTE2EConfig
from .configuration_ttt_layers import TTTLayersConfig
from .modeling_recurrent_hybrid import (
    RecurrentHybridForCausalLM,
    RecurrentHybridModel,
    RecurrentHybridPreTrainedModel,
)
from .modeling_ttt_e2e import (
    TTTE2EForCausalLM,
    TTTE2EForQuestionAnswering,
    TTTE2EForSequenceClassification,
    TTTE2EForTokenClassification,
    TTTE2EModel,
    TTTE2EPreTrainedModel,
)
from .modeling_ttt_layers import TTTLayersForCausalLM, TTTLayersModel, TTTLayersPreTrainedModel
from .registration import register

register(
    TTTE2EConfig,
    TTTE2EModel,
    {
        AutoModelForCausalLM: TTTE2EForCausalLM,
        AutoModelForQuestionAnswering: TTTE2EForQuestionAnswering,
        AutoModelForSequenceClassification: TTTE2EForSequenceClassification,
        AutoModelForTokenClassification: TTTE2EForTokenClassification,
    },
)
register(RecurrentHybridConfig, RecurrentHybridModel, {AutoModelForCausalLM: RecurrentHybridForCausalLM})
register(TTTLayersConfig, TTTLayersModel, {AutoModelForCausalLM: TTTLayersForCausalLM})

__version__ = "0.1.0"
__all__ = [
    "RecurrentHybridConfig",
    "RecurrentHybridForCausalLM",
    "RecurrentHybridModel",
    "RecurrentHybridPreTrainedModel",
    "TTTE2ECache",
    "TTTE2EConfig",
    "TTTE2EForCausalLM",
    "TTTE2EForQuestionAnswering",
    "TTTE2EForSequenceClassification",
    "TTTE2EForTokenClassification",
    "TTTE2EModel",
    "TTTE2EPreTrainedModel",
    "TTTLayersCache",
    "TTTLayersConfig",
    "TTTLayersForCausalLM",
    "TTTLayersModel",
    "TTTLayersPreTrainedModel",
]
