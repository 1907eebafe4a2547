"""Between the models of this package and other layouts: official checkpoints, and pretrained transformers.

Nothing of it goes into a Hub folder.
"""

from .official_checkpoint import convert_official, export_official
from .prime_weights import PrimeWeights
from .transformer_layout import WarmStartSettings, warm_started_model
from .ttt_layers_checkpoint import convert_ttt_layers
from .warm_start import WarmStartRequest, prepare_warm_start, write_warm_start

__all__ = [
    "PrimeWeights",
    "WarmStartRequest",
    "WarmStartSettings",
    "convert_official",
    "convert_ttt_layers",
    "export_official",
    "prepare_warm_start",
    "warm_started_model",
    "write_warm_start",
]
