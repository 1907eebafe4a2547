"""Training: `MetaTrainer`, what a run needs around it, and the names of `ttt_e2e.data` that stand here as well."""

from ..data import (
    DocumentRows,
    PackedRows,
    PackedStream,
    TokenStore,
    collate_rows,
    document_prefixes,
    load_documents,
    load_tokenizer,
    longest_reading,
    separator_id,
    split_documents,
    standard_library_documents,
    tokenize_documents,
    train_tokenizer,
    trained_tokenizer,
)
from .arguments import MetaTrainingArguments
from .meta_trainer import MetaTrainer
from .prime_trainer import PrimeTrainer

__all__ = [
    "DocumentRows",
    "MetaTrainer",
    "MetaTrainingArguments",
    "PackedRows",
    "PackedStream",
    "PrimeTrainer",
    "TokenStore",
    "collate_rows",
    "document_prefixes",
    "load_documents",
    "load_tokenizer",
    "longest_reading",
    "separator_id",
    "split_documents",
    "standard_library_documents",
    "tokenize_documents",
    "train_tokenizer",
    "trained_tokenizer",
]
