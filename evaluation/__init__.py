"""What a model has learned while it reads: loss by token position, tables, pictures, and reading long texts."""

from .loss_by_position import bucket_bounds, bucket_means, loss_by_position
from .plots import plot_loss_by_position
from .reading import read_tokens
from .tables import Table, loss_table

__all__ = [
    "Table",
    "bucket_bounds",
    "bucket_means",
    "loss_by_position",
    "loss_table",
    "plot_loss_by_position",
    "read_tokens",
]
