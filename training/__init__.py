"""From documents to a trained model: corpus, tokenizer, rows of tokens, and the glue around `transformers.Trainer`."""

from .corpus import split_documents, standard_library_documents
from .data import document_prefixes, longest_reading, pack_rows, tokenize_documents
from .tokenizer import train_tokenizer
from .trainer import TrainingRun, train_model

__all__ = [
    "TrainingRun",
    "document_prefixes",
    "longest_reading",
    "pack_rows",
    "split_documents",
    "standard_library_documents",
    "tokenize_documents",
    "train_model",
    "train_tokenizer",
]
