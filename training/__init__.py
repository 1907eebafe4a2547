"""From documents to a trained model: corpus, tokenizer, rows of tokens, and the glue around `transformers.Trainer`."""

from .arguments import MetaTrainingArguments
from .corpus import split_documents, standard_library_documents
from .data import DocumentRows, PackedRows, PackedStream, collate_rows, document_prefixes, longest_reading
from .meta_trainer import MetaTrainer
from .sources import load_documents
from .token_store import TokenStore, tokenize_documents
from .tokenizer import load_tokenizer, separator_id, train_tokenizer, trained_tokenizer
from .trainer import TrainingRun, train_model

__all__ = [
    "DocumentRows",
    "MetaTrainer",
    "MetaTrainingArguments",
    "PackedRows",
    "PackedStream",
    "TokenStore",
    "TrainingRun",
    "collate_rows",
    "document_prefixes",
    "load_documents",
    "load_tokenizer",
    "longest_reading",
    "separator_id",
    "split_documents",
    "standard_library_documents",
    "tokenize_documents",
    "train_model",
    "train_tokenizer",
    "trained_tokenizer",
]
