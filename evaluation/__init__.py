"""Evaluation of any causal language model against context length, learning while it reads or not."""

from .context_length import measure_loss_at_context
from .decoding_loss import measure_decoding_loss
from .latency import measure_latency
from .loss_by_position import bucket_bounds, bucket_means, loss_by_position
from .needle import measure_needle
from .perplexity import measure_perplexity
from .plots import plot_loss_by_position
from .reading import read_tokens
from .runs import EvaluationRequest, measure_missing, prepare_evaluation, write_comparison
from .subject import Subject, load_subject, token_losses
from .tables import Table, loss_table

__all__ = [
    "EvaluationRequest",
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
    "measure_missing",
    "measure_needle",
    "measure_perplexity",
    "plot_loss_by_position",
    "prepare_evaluation",
    "read_tokens",
    "token_losses",
    "write_comparison",
]
