"""Documents to read: from a file to tokens, and from tokens to a learned context."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .. import TTTE2EForCausalLM
from ..data.files import decoded
from ..data.tokenizer import encode_texts, separator_id
from ..evaluation.long_reading import read_tokens
from .contexts import ReadDocument, StoredContext
from .models import TextModel

# A tokenizer's own memory is many times its input, so that it is given a long text in pieces.
PIECE_CHARACTERS = 1_000_000
STANDARD_INPUT = Path("-")
# Tokens between two movements of the progress bar.
STEP = 1024


def document_name(path: Path) -> str:
    """What a document is called afterwards."""
    if path == STANDARD_INPUT:
        return "standard input"
    return path.name if path.is_file() else str(path)  # /dev/fd/63 says little, 63 nothing


def document_text(path: Path) -> str:
    """The text of a file in UTF-8; of a pipe (`/dev/stdin`, `<(...)`) and, for `-`, of the standard input as well.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text, or empty.
    """
    if path == STANDARD_INPUT:
        return _some_text(sys.stdin.buffer.read(), path)
    if not path.exists():
        raise FileNotFoundError(f"document={str(path)!r}: there is no such file; correct the path")
    if not path.is_file() and not path.is_fifo():
        raise ValueError(f"document={str(path)!r} is not a file; name the files in it one by one")
    return _some_text(path.read_bytes(), path)


def _some_text(data: bytes, path: Path) -> str:
    text = decoded(data, f"document={str(path)!r}")
    if not text.strip():
        raise ValueError(f"document={str(path)!r} is empty: there is nothing to read")
    return text


def text_tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, begin: bool, split_special_tokens: bool = True
) -> torch.Tensor:
    """The ids of a text, int64 [tokens].

    Args:
        text: one of more than a million characters is tokenized piece by piece, cut at line ends or before spaces.
        begin: put the token first that stands before every document in training.
        split_special_tokens: as in `encode_texts`.

    Raises:
        ValueError: `begin`, and the tokenizer has no such token.
    """
    ids = [torch.tensor([separator_id(tokenizer)])] if begin else []
    for piece in _pieces(text):
        [found] = encode_texts([piece], tokenizer, split_special_tokens)
        ids.append(torch.tensor(found, dtype=torch.long))
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.long)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            line_end = text.rfind("\n", start, end) + 1
            space = text.rfind(" ", start + 1, end)  # the word behind it takes it along
            end = next((place for place in (line_end, space) if place > start), end)
        yield text[start:end]
        start = end


def read_documents(
    text_model: TextModel, context: StoredContext, documents: Sequence[tuple[str, torch.Tensor]]
) -> StoredContext:
    """As `read_document`, of several documents one after the other.

    Args:
        documents: name and ids (int64 [tokens]) of each.

    Returns:
        The context after all of them.
    """
    for name, ids in documents:
        context, _ = read_document(text_model, context, name, ids)
    return context


def read_document(
    text_model: TextModel, context: StoredContext, name: str, ids: torch.Tensor
) -> tuple[StoredContext, list[float]]:
    """Read a document, with a progress bar.

    Args:
        context: what was read before; stays as it is.
        name: of the document; ids: int64 [tokens].

    Returns:
        The context after it, and the losses of its mini-batches as `read_tokens` gives them.

    Raises:
        ValueError: the model does not learn while it reads.
    """
    check_learns(text_model.model)
    context, rows = context.fork(), ids[None].to(text_model.model.device)
    losses = read_tokens(text_model.model, rows, context.cache, STEP, description=f"Reading {name}")
    return replace(context, documents=(*context.documents, ReadDocument(name, len(ids)))), losses


def check_learns(model: TTTE2EForCausalLM) -> None:
    """Check that something is left of what a model reads.

    Raises:
        ValueError: its configuration says that it does not learn.
    """
    if not model.config.test_time_training:
        raise ValueError(
            "The model's configuration says test_time_training=False, so that it would forget all but the last "
            "window of what it reads; name a model that learns"
        )
