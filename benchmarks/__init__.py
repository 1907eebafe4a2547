"""Speed and memory, side by side with the same model without test-time training."""

from .memory import measure_memory
from .speed import SpeedSizes, measure_decoding, measure_passes

__all__ = ["SpeedSizes", "measure_decoding", "measure_memory", "measure_passes"]
