"""The tokens of all documents as one flat array on the disk, cached by content."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..storage.cached_folder import cached_folder
from ..storage.digests import digest
from ..storage.disk import check_disk_space
from .texts import TextTotals, text_batches, text_totals
from .tokenizer import encode_documents, separator_id, tokenizer_digest

FORMAT = 1
TOKENS, STARTS, NAMES, MANIFEST = "tokens.npy", "starts.npy", "names.json", "store.json"
BYTES_PER_TOKEN = 2  # of text; more are usual, so that the estimate of the disk space is on the safe side


class TokenStore:
    """Documents as tokens, each with the separator before it and nothing at its end; a folder that stays on the disk.

    It can be pickled (only its folder is), and holds no tokens in memory. Its files are opened at once: what has them
    open goes on reading them when the folder is removed.

    Args:
        folder: written by `tokenize_documents`.

    Raises:
        FileNotFoundError: the folder has been removed.

    Attributes:
        tokens: `[num_tokens]`, uint16 or uint32, memory-mapped: all documents in their order.
        starts: `[num_documents + 1]`, int64, memory-mapped: where each document begins, and at last where all end.
        num_tokens: of all documents, separators included.
        num_documents: how many there are.
        separator_id: the token before each document.
    """

    def __init__(self, folder: Path):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.tokens: np.ndarray = np.load(folder / TOKENS, mmap_mode="r")
            self.starts: np.ndarray = np.load(folder / STARTS, mmap_mode="r")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder}: the prepared data has been removed ({Path(error.filename).name} is missing); start the "
                "command again, which prepares it anew (a training with --resume)"
            ) from error
        self.folder = folder
        self.num_tokens: int = manifest["tokens"]
        self.num_documents: int = manifest["documents"]
        self.separator_id: int = manifest["separator_id"]

    @cached_property
    def names(self) -> list[str]:
        """The column `path` of the documents; their numbers where they had none."""
        path = self.folder / NAMES
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        return [f"document {number}" for number in range(self.num_documents)]

    def lengths(self) -> np.ndarray:
        """`[num_documents]`, int64: tokens of each document, its separator included."""
        return np.diff(self.starts)

    def document(self, number: int) -> np.ndarray:
        """`[length]`: the tokens of one document, still on the disk."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    def __reduce__(self) -> tuple:
        return TokenStore, (self.folder,)


class ArrayFile:
    """A one-dimensional `.npy` file that is written piece by piece; `numpy.save` would need all of it in memory."""

    def __init__(self, path: Path, dtype: type[np.integer]):
        self.dtype, self.length = np.dtype(dtype), 0
        self.file = path.open("wb")
        self._write_header()

    def append(self, values: Sequence[int]) -> None:
        # From Python's integers, not from an array: what does not fit is then an error and is not cut off.
        self.file.write(np.array(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        with self.file:
            self.file.seek(0)
            self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room in it for the length to grow, so that it can be written again in place.
        description = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)


def tokenize_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, cache_folder: Path, split_special_tokens: bool = True
) -> TokenStore:
    """Encode every document with the separator before it, or take what was written for the same texts before.

    Args:
        documents: column `text`; `path` becomes the names.
        tokenizer: its own begin and end tokens are not added.
        cache_folder: the store is a folder below it, named by the hash of all texts, names, the tokenizer and its use.
        split_special_tokens: as in `encode_texts`.

    Raises:
        ValueError: there are no documents, or the tokenizer has no token for the separator.
        OSError: there is too little space on the disk.
    """
    separator = separator_id(tokenizer)
    if len(documents) == 0:
        raise ValueError("documents: there are none to tokenize; give at least one")
    totals = text_totals(documents)
    names = documents["path"][:] if "path" in documents.column_names else None
    settings = {
        "format": FORMAT,
        "texts": totals.digest,
        "names": digest(names),
        "tokenizer": tokenizer_digest(tokenizer),
        "separator_id": separator,
        "split_special_tokens": split_special_tokens,
    }
    key = digest(settings)
    folder = Path(cache_folder) / "tokens" / key

    def build(part: Path) -> dict:
        dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
        check_disk_space(part, _expected_bytes(totals, np.dtype(dtype).itemsize), "a copy of the tokens")
        if names is not None:
            (part / NAMES).write_text(json.dumps(names), encoding="utf-8")
        encode = partial(encode_documents, tokenizer=tokenizer, split_special_tokens=split_special_tokens)
        tokens = _write_tokens(documents, encode, part, dtype)
        return settings | {"key": key, "tokens": tokens, "documents": totals.documents}

    cached_folder(folder, MANIFEST, build)
    return TokenStore(folder)


def _write_tokens(
    documents: Dataset, encode: Callable[[list[str]], list[list[int]]], part: Path, dtype: type[np.integer]
) -> int:
    with (
        ArrayFile(part / TOKENS, dtype) as tokens,
        ArrayFile(part / STARTS, np.int64) as starts,
        tqdm(total=len(documents), desc="Tokenizing", unit=" documents", unit_scale=True) as progress,
    ):
        for texts in text_batches(documents):
            for ids in encode(texts):
                starts.append([tokens.length])
                tokens.append(ids)
            progress.update(len(texts))
        starts.append([tokens.length])
        return tokens.length


def _expected_bytes(totals: TextTotals, token_bytes: int) -> int:
    return (totals.text_bytes // BYTES_PER_TOKEN + totals.documents) * token_bytes + (totals.documents + 1) * 8
