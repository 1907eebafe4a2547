"""From the name of a source to documents, a tokenizer and rows of tokens, for whoever reads text."""

from .corpus import split_documents, standard_library_documents
from .named_documents import NamedDocuments
from .rows import DocumentRows, PackedRows, PackedStream, collate_rows, document_prefixes, longest_reading
from .sources import load_documents
from .token_store import TokenStore, tokenize_documents
from .tokenizer import load_tokenizer, separator_id, train_tokenizer, trained_tokenizer

__all__ = [
    "DocumentRows",
    "NamedDocuments",
    "PackedRows",
    "PackedStream",
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
