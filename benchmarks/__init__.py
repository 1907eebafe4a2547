"""Speed and memory, side by side with stock transformers' models and with learning off."""

from .memory import measure_memory
from .report import report, tables, write_report
from .speed import Works, measure_times
from .ttt_layers import TTTLayerSizes, measure_forms, measure_lengths

__all__ = [
    "TTTLayerSizes",
    "Works",
    "measure_forms",
    "measure_lengths",
    "measure_memory",
    "measure_times",
    "report",
    "tables",
    "write_report",
]
