"""Evaluation of any causal language model against context length, learning while it reads or not."""

from .context_length import measure_loss_at_context
from .decoding_loss import measure_decoding_loss
from .latency import measure_latency
from .loss_by_position import bucket_bounds, bucket_means, loss_by_position
from .perplexity import measure_perplexity
from .plots import plot_loss_by_position
from .reading import read_tokens
from .subject import Subject, load_subject, token_losses
from .tables import Table, loss_table

__all__ = [
    "Subject",
    "Table",
    "bucket_bounds",
    "bucket_means",
    "load_subject",
    "loss_by_position",
    "loss_table",
    "measure_decoding_loss",
    "measure_latency",
    "measure_loss_at_context",
    "measure_perplexity",
    "plot_loss_by_position",
    "read_tokens",
    "token_losses",
]
