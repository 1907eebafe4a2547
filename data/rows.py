"""From documents to the rows of tokens that a model is trained on.

All documents, each with one separator before it, form one stream that is cut into rows of T + 1 tokens: the first T are
inputs, the last T targets. Documents are not reset at the borders of rows, and what is left over at the end is dropped.
The labels of a row are its tokens, but -100 (not predicted) where the token is the separator; the model itself compares
each position with the label of the next one.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from datasets import IterableDataset as DocumentStream
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from ..causal_lm_loss import NO_TARGET
from .texts import text_batches
from .token_store import TokenStore
from .tokenizer import encode_documents, separator_id


class PackedRows(Dataset):
    """Rows of `sequence_length` + 1 tokens across documents, read from the disk when they are asked for.

    A row is `input_ids` and `labels`, `[sequence_length + 1]`, int64.

    Raises:
        ValueError: the store has fewer tokens than one row.
    """

    def __init__(self, store: TokenStore, sequence_length: int):
        _check_sequence_length(sequence_length)
        if store.num_tokens <= sequence_length:
            raise ValueError(_too_few_tokens(sequence_length, store.num_tokens))
        self.store, self.row_length = store, sequence_length + 1

    def __len__(self) -> int:
        return self.store.num_tokens // self.row_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = range(len(self))[index] * self.row_length
        return _row(self.store.tokens[start : start + self.row_length], self.store.separator_id)


class DocumentRows(Dataset):
    """Rows of one document each; a document of more than `sequence_length` + 1 tokens has several rows of its own.

    A row is `input_ids` and `labels`, int64, of 2 to `sequence_length` + 1 tokens. A rest of one token has nothing to
    predict and is dropped.

    Raises:
        ValueError: no document has two tokens.
    """

    def __init__(self, store: TokenStore, sequence_length: int):
        _check_sequence_length(sequence_length)
        self.store, self.row_length = store, sequence_length + 1
        lengths = store.lengths()
        rows = lengths // self.row_length + (lengths % self.row_length > 1)
        # [num_documents]: rows of all documents up to and with this one.
        self.row_ends = np.cumsum(rows)
        if self.row_ends[-1] == 0:
            raise ValueError(
                f"sequence_length={sequence_length}: none of the {store.num_documents} documents has a token besides "
                "its separator; give documents with text"
            )

    def __len__(self) -> int:
        return int(self.row_ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = range(len(self))[index]
        document = int(np.searchsorted(self.row_ends, row, side="right"))
        rows_before = int(self.row_ends[document - 1]) if document else 0
        start = (row - rows_before) * self.row_length
        return _row(self.store.document(document)[start : start + self.row_length], self.store.separator_id)


class PackedStream(IterableDataset):
    """The rows of `PackedRows` from documents that are tokenized while training; nothing is written to the disk.

    It has no end: after the last document it begins anew, in another order where the documents are a shuffled stream.
    Every iteration gives the same rows, so that a resumed training can skip those it has seen. With several DataLoader
    workers each of them packs its own share of the files of the stream.

    Args:
        documents: column `text`.
        tokenizer: its own begin and end tokens are not added.
        sequence_length: a row has one token more.
        split_special_tokens: as in `encode_texts`.

    Raises:
        ValueError: at the end of the documents, where they have fewer tokens than one row.
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        split_special_tokens: bool = True,
    ):
        _check_sequence_length(sequence_length)
        self.split_special_tokens = split_special_tokens
        self.documents, self.tokenizer, self.row_length = documents, tokenizer, sequence_length + 1
        self.separator_id = separator_id(tokenizer)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for epoch in itertools.count():
            self.documents.set_epoch(epoch)
            rows = 0
            for row in self._one_pass():
                yield row
                rows += 1
            if rows == 0:
                # A worker may have a small share, or none.
                return

    def _one_pass(self) -> Iterator[dict[str, torch.Tensor]]:
        tokens, rest = 0, np.empty(0, dtype=np.int64)
        for texts in text_batches(self.documents):
            encoded = encode_documents(texts, self.tokenizer, self.split_special_tokens)
            rest = np.concatenate([rest, *(np.array(ids, dtype=np.int64) for ids in encoded)])
            tokens += sum(map(len, encoded))
            end = len(rest) - len(rest) % self.row_length
            for start in range(0, end, self.row_length):
                yield _row(rest[start : start + self.row_length], self.separator_id)
            rest = rest[end:]
        if tokens < self.row_length and get_worker_info() is None:
            raise ValueError(_too_few_tokens(self.row_length - 1, tokens))


def collate_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put rows side by side: `input_ids` and `labels`, `[rows, longest]`, int64.

    Where their lengths differ, the shorter ones are padded on the right with `labels` -100, and there is an
    `attention_mask` `[rows, longest]`, int64: 1 for a token, 0 for padding.
    """
    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=NO_TARGET),
    }
    if len({len(row) for row in ids}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return batch


def document_prefixes(store: TokenStore, length: int, count: int) -> tuple[list[str], torch.Tensor]:
    """The first `length` tokens of the first `count` documents that have so many.

    Returns:
        Names of the documents, and their tokens, `[documents, length]`, int64.

    Raises:
        ValueError: not one document is long enough.
    """
    chosen = np.flatnonzero(store.lengths() >= length)[:count].tolist()
    if not chosen:
        raise ValueError(f"length={length}: no document has so many tokens; give longer documents or a smaller length")
    prefixes = np.stack([store.document(number)[:length] for number in chosen])
    return [store.names[number] for number in chosen], torch.from_numpy(prefixes.astype(np.int64))


def longest_reading(store: TokenStore, length: int) -> tuple[list[str], torch.Tensor]:
    """Tokens of the longest document, followed by the next longest ones while that is not enough.

    Returns:
        Names of the documents that were used, and `[length]` tokens, int64.

    Raises:
        ValueError: all documents together are too short.
    """
    if store.num_tokens < length:
        raise ValueError(f"length={length}: the documents have only {store.num_tokens} tokens; give a smaller length")
    lengths = store.lengths()
    by_length = np.argsort(-lengths, kind="stable")
    used = by_length[: 1 + np.searchsorted(np.cumsum(lengths[by_length]), length)].tolist()
    tokens = np.concatenate([store.document(number) for number in used])[:length]
    return [store.names[number] for number in used], torch.from_numpy(tokens.astype(np.int64))


def labelled_row(input_ids: torch.Tensor, separator: int) -> dict[str, torch.Tensor]:
    """A row of tokens, int64 [tokens], with its labels."""
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids == separator, NO_TARGET)}


def _row(tokens: np.ndarray, separator: int) -> dict[str, torch.Tensor]:
    return labelled_row(torch.from_numpy(tokens.astype(np.int64)), separator)


def _check_sequence_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length}: must be at least 1")


def _too_few_tokens(sequence_length: int, tokens: int) -> str:
    return (
        f"sequence_length={sequence_length}: a row has {sequence_length + 1} tokens, and the documents have only "
        f"{tokens}; give more text or a smaller sequence_length"
    )
