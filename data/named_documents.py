"""The documents of a source by number and name, each read when it is wanted: what cannot be read costs only itself."""

import bisect
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow.compute
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from ..storage.cached_folder import cached_folder
from ..storage.digests import digest, file_digest
from ..storage.disk import check_disk_space
from .addresses import is_address
from .files import TEXT, decoded, file_kind, record_texts
from .sources import BUILT_IN, DOCUMENTS, MANIFEST, files_of_source, load_documents, looks_like_path

# A name that may be that of a folder as it is; the eight digits belong to the rows of a file.
PLAIN, ROW = re.compile(r"\w[\w.-]*"), re.compile(r".*-\d{8}")
LONGEST_NAME = 200  # bytes; file systems have 255, of which locks and temporary folders need some


@dataclass(frozen=True)
class _Part:
    """A file, or the rows of one, or of a data set.

    Attributes:
        name: of the file or split; rows: how many documents it has; None where it is one itself.
        sizes: bytes of each document, 0 where they are not known.
        read: the text of a row. It raises ValueError or OSError for one that cannot be read.
    """

    name: str
    rows: int | None
    sizes: list[int]
    read: Callable[[int], str]


class NamedDocuments:
    """The documents of a source, numbered in its order.

    Args:
        source: as `load_documents` takes it. Every text file of a folder is a document, every row of a `.jsonl`,
            `.json` or `.parquet` file, and every row of a data set.
        cache_folder: where rows are kept, so that any of them can be read at once.
        text_column: of the rows; split: of a data set of the Hub.

    Raises:
        FileNotFoundError: the source looks like a path, and there is nothing.
        ValueError: there is no document in it, or it is a data set that cannot be loaded.
    """

    def __init__(self, source: str | Path, *, cache_folder: Path, text_column: str = "text", split: str = "train"):
        path = Path(source).expanduser()
        if source in BUILT_IN or is_address(source) or not (path.exists() or looks_like_path(source)):
            documents = load_documents(source, cache_folder=cache_folder, text_column=text_column, split=split)
            self._parts = _parts_of_dataset(documents, split)
        else:
            root, files = files_of_source(path)
            self._parts = [_part_of_file(file, root, text_column, Path(cache_folder)) for file in files]
        self._ends = list(accumulate(1 if part.rows is None else part.rows for part in self._parts))
        if not len(self):
            raise ValueError(f"source={source}: there is no document in it; name one with text")

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, number: int) -> str:
        """The document's path in its folder, and the row where it is one of several."""
        part, row = self._find(number)
        return part.name if part.rows is None else f"{part.name}, row {row}"

    def folder_name(self, number: int) -> str:
        """A name for a folder: that of the file where it can be one, and no two documents' alike."""
        part, row = self._find(number)
        return safe_name(part.name) if part.rows is None else f"{safe_name(part.name)}-{row:08d}"

    def size(self, number: int) -> int:
        """Bytes of the document, by which the longest can be read first; 0 where they are not known."""
        part, row = self._find(number)
        return part.sizes[row]

    def text(self, number: int) -> str:
        """The text.

        Raises:
            ValueError, OSError: it cannot be read, is not text, or is empty.
        """
        part, row = self._find(number)
        text = part.read(row)
        if not text.strip():
            raise ValueError(f"{self.name(number)}: is empty: there is nothing to read")
        return text

    def _find(self, number: int) -> tuple[_Part, int]:
        index = bisect.bisect_right(self._ends, number)
        return self._parts[index], number - (self._ends[index - 1] if index else 0)


def safe_name(name: str) -> str:
    """A name that is safe as that of a folder: itself where it is plain, else with a digest behind it."""
    if PLAIN.fullmatch(name) and not ROW.fullmatch(name) and len(name.encode()) <= LONGEST_NAME:
        return name
    readable = re.sub(r"[^\w.-]+", "-", name).strip(".-").encode()[: LONGEST_NAME // 2].decode(errors="ignore")
    # Ten digits, so that no row of another file is called like it.
    return f"{readable or 'document'}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def _parts_of_dataset(documents: Dataset, split: str) -> list[_Part]:
    def read(row: int) -> str:
        text = documents[row]["text"]
        if not isinstance(text, str):
            raise ValueError(f"row {row}: holds no text ({text!r}); leave it out")
        return text

    sizes = _text_sizes(documents)
    if "path" not in documents.column_names:
        return [_Part(split, len(documents), sizes, read)]
    return [_Part(path, None, [sizes[row]], lambda _, row=row: read(row)) for row, path in enumerate(documents["path"])]


def _part_of_file(file: Path, root: Path, text_column: str, cache_folder: Path) -> _Part:
    # Names of files may be no Unicode, which JSON must be.
    name = os.fsencode(file.relative_to(root).as_posix()).decode(errors="backslashreplace")
    if file_kind(file) == TEXT or not os.access(file, os.R_OK):
        return _Part(name, None, [file.stat().st_size], lambda _: decoded(file.read_bytes(), name))
    documents = _rows_of_file(file, text_column, cache_folder)

    def read(row: int) -> str:
        found = documents[row]
        if found["error"] is not None:
            raise ValueError(found["error"])
        return found["text"]

    return _Part(name, len(documents), _text_sizes(documents), read)


def _rows_of_file(file: Path, text_column: str, cache_folder: Path) -> Dataset:
    """The rows of a file, written once where any of them is found at once: `text`, or the `error` in its place."""
    folder = cache_folder / "rows" / digest([str(file), file_digest(file), text_column])

    def build(part: Path) -> dict:
        check_disk_space(part, file.stat().st_size, "a copy of the documents")
        features = Features({"text": Value("large_string"), "error": Value("large_string")})
        with ArrowWriter(features=features, path=str(part / DOCUMENTS), writer_batch_size=100) as writer:
            for text in tqdm(record_texts(file, text_column), desc=f"Listing {file.name}", unit=" rows", delay=5):
                failed = isinstance(text, ValueError)
                writer.write({"text": None if failed else text, "error": str(text) if failed else None})
            count, _ = writer.finalize()
        return {"rows": count}

    cached_folder(folder, MANIFEST, build)
    return Dataset.from_file(str(folder / DOCUMENTS))


def _text_sizes(documents: Dataset) -> list[int]:
    sizes = pyarrow.compute.binary_length(documents.data.column("text"))
    return [size or 0 for size in sizes.to_pylist()]
