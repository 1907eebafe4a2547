"""Speed and memory, side by side with the same model without test-time training."""

from .memory import measure_memory
from .speed import SpeedSizes, measure_decoding, measure_passes
from .ttt_layers import TTTLayerSizes, measure_forms, measure_lengths

__all__ = [
    "SpeedSizes",
    "TTTLayerSizes",
    "measure_decoding",
    "measure_forms",
    "measure_lengths",
    "measure_memory",
    "measure_passes",
]
