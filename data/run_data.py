"""The data of a run: documents, tokenizer, and rows for training and validation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset as Documents
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from ..configuration import DataRecipe
from .addresses import check_address
from .corpus import split_documents
from .needle_rows import NeedleRows
from .rows import DocumentRows, PackedRows, PackedStream
from .sources import load_documents, source_state
from .token_store import TokenStore, tokenize_documents
from .tokenizer import load_tokenizer, tokenizer_digest, trained_tokenizer


@dataclass(frozen=True)
class DataRequest:
    """Where the data of a run comes from.

    Attributes:
        data: as `load_documents` takes it; validation_data: the same, or None.
        tokenizer: a folder or an id of the Hub; None for one trained on the data.
        vocabulary_size: of a tokenizer that is trained.
        recipe: how documents become rows.
        cache: where prepared data is kept.
    """

    data: str
    validation_data: str | None
    tokenizer: str | None
    vocabulary_size: int
    recipe: DataRecipe
    cache: Path


@dataclass(frozen=True)
class TrainingData:
    """Rows for training and validation (None: there is none), their tokenizer, and what identifies them."""

    rows: Dataset
    validation: Dataset | None
    tokenizer: PreTrainedTokenizerBase
    identity: dict


def check_data_request(request: DataRequest) -> None:
    """Check what can be checked before any document is read.

    Raises:
        ValueError: the request contradicts itself.
    """
    recipe = request.recipe
    for source in (request.data, request.validation_data):
        if source is not None:
            check_address(source)
    if recipe.streaming:
        refusals = {
            "data.validation_every cannot split data.streaming documents: set it to null, and give --validation-data": (
                recipe.validation_every is not None
            ),
            "data.one_document_per_row needs all documents first: turn data.streaming off": recipe.one_document_per_row,
            "data.needle_share needs rows that are there: set it to 0, or turn data.streaming off": (
                recipe.needle_share > 0
            ),
            "tokenizer: none can be trained on data.streaming documents; name one with --tokenizer": (
                request.tokenizer is None
            ),
        }
        for message, refused in refusals.items():
            if refused:
                raise ValueError(message)
    if recipe.tuning and (request.validation_data is not None or recipe.validation_every is None):
        raise ValueError(
            "data.tuning=True keeps back training documents beside those of data.validation_every: set that to a "
            "number, and give no --validation-data"
        )
    if request.validation_data == request.data and recipe.validation_split == recipe.split:
        raise ValueError(
            f"validation_data={request.validation_data!r} is the training data: name other data, or (of the Hub) "
            "another data.validation_split, or keep some documents back with data.validation_every"
        )


def prepare_data(request: DataRequest, check_tokenizer: Callable[[PreTrainedTokenizerBase], object]) -> TrainingData:
    """Documents, tokenizer and rows of a run; from the cache what is there already.

    Args:
        check_tokenizer: is called before anything is tokenized.

    Raises:
        ValueError, OSError: there is too little data, it cannot be read, or the request contradicts itself.
    """
    check_data_request(request)
    recipe = request.recipe
    tokenizer = None if request.tokenizer is None else load_tokenizer(request.tokenizer)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    documents, held_out = _load(request, request.data, recipe.split, recipe.streaming), None
    if request.validation_data is not None:
        held_out = _load(request, request.validation_data, recipe.validation_split, streaming=False)
    elif recipe.validation_every is not None:
        for _ in range(2 if recipe.tuning else 1):
            documents, held_out = split_documents(
                documents, recipe.validation_every, recipe.training_only, recipe.whole_folders
            )
    if tokenizer is None:
        tokenizer = trained_tokenizer(documents, request.vocabulary_size, request.cache)
    identity = {"tokenizer": tokenizer_digest(tokenizer)}
    rows: Dataset
    if recipe.streaming:
        rows = PackedStream(documents, tokenizer, recipe.sequence_length, recipe.split_special_tokens)
        identity["data"] = source_state(request.data)
        next(iter(rows))  # too few tokens are noticed here
    else:
        store = tokenize_documents(documents, tokenizer, request.cache, recipe.split_special_tokens)
        identity["data"], whole = store.folder.name, _rows(store, recipe)
        rows = NeedleRows(whole, tokenizer, recipe.needle_share) if recipe.needle_share else whole
    validation = None
    if held_out is not None:
        store = tokenize_documents(held_out, tokenizer, request.cache, recipe.split_special_tokens)
        validation, identity["validation"] = _some(_rows(store, recipe), recipe.validation_rows), store.folder.name
    return TrainingData(rows, validation, tokenizer, identity)


def _load(request: DataRequest, source: str, split: str, streaming: bool) -> Documents:
    return load_documents(
        source,
        cache_folder=request.cache,
        text_column=request.recipe.text_column,
        split=split,
        configuration=request.recipe.configuration if source == request.data else None,
        streaming=streaming,
    )


def _rows(store: TokenStore, recipe: DataRecipe) -> PackedRows | DocumentRows:
    return (DocumentRows if recipe.one_document_per_row else PackedRows)(store, recipe.sequence_length)


def _some(rows: PackedRows | DocumentRows, most: int | None) -> Dataset:
    """At most so many rows, evenly spread over all."""
    if most is None or len(rows) <= most:
        return rows
    return Subset(rows, torch.linspace(0, len(rows) - 1, most).long().tolist())
