"""Evaluation of any causal language model against context length, learning while it reads or not."""

from .bits_per_byte import bits_per_byte
from .candidates import load_subject
from .decoding_loss import decoding_loss
from .latency import latency
from .long_reading import read_tokens
from .loss_by_context_length import loss_by_context_length
from .loss_by_position import bucket_bounds, bucket_means, loss_by_position
from .metric_path import metric_path
from .needle_in_a_haystack import needle_in_a_haystack
from .perplexity import perplexity
from .plots import plot_loss_by_position
from .runs import EvaluationRequest, measure_missing, prepare_evaluation, write_comparison
from .subject import Subject, token_losses
from .tables import Table

__all__ = [
    "EvaluationRequest",
    "Subject",
    "Table",
    "bits_per_byte",
    "bucket_bounds",
    "bucket_means",
    "decoding_loss",
    "latency",
    "load_subject",
    "loss_by_context_length",
    "loss_by_position",
    "measure_missing",
    "metric_path",
    "needle_in_a_haystack",
    "perplexity",
    "plot_loss_by_position",
    "prepare_evaluation",
    "read_tokens",
    "token_losses",
    "write_comparison",
]
