"""Files of text, JSON lines and parquet, read document by document."""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
JSON, PARQUET, TEXT = "json", "parquet", "text"
KINDS = {".jsonl": JSON, ".json": JSON, ".parquet": PARQUET}


def file_kind(path: Path) -> str:
    """`JSON`, `PARQUET` or (any other suffix) `TEXT`. JSON files may be compressed: their last suffix is then that."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED and KINDS.get("".join(suffixes[-2:-1])) == JSON:
        return JSON
    return KINDS.get(suffixes[-1], TEXT) if suffixes else TEXT


def documents_of_files(
    files: Sequence[Path], root: Path, text_column: str, with_paths: bool
) -> Iterator[dict[str, str]]:
    """The documents of all files in their order: `text`, and `path` (of the file, relative to the root) if asked for.

    Raises:
        ValueError: a file is not what its suffix says, or a record has no text.
    """
    for path in files:
        name = {"path": path.relative_to(root).as_posix()} if with_paths else {}
        for text in file_texts(path, text_column):
            yield {**name, "text": text}


def file_texts(path: Path, text_column: str) -> Iterator[str]:
    """The documents of one file: the file itself, or the texts of its records."""
    if file_kind(path) == TEXT:
        yield decoded(path.read_bytes(), path)
        return
    for text in record_texts(path, text_column):
        if isinstance(text, ValueError):
            raise text
        yield text


def record_texts(path: Path, text_column: str) -> Iterator[str | ValueError]:
    """The texts of the records of one file; the error in the place of one that has none.

    Where the file itself is damaged its error is the last that comes.
    """
    read = _json_records if file_kind(path) == JSON else _parquet_records
    try:
        for where, record in read(path, text_column):
            yield _text_of(record, where, text_column)
    except ValueError as error:
        yield error


def _text_of(record: object, where: str, text_column: str) -> str | ValueError:
    if isinstance(record, ValueError):
        return record
    if not isinstance(record, dict):
        return ValueError(f"{where}: must be a JSON object with the field text_column={text_column!r}")
    if text_column not in record:
        return ValueError(f"{where}: {missing_column(text_column, record)}")
    try:
        _check_text(record[text_column], where, text_column)
    except ValueError as error:
        return error
    return record[text_column]


def missing_column(text_column: str, columns: Iterable[str]) -> str:
    """The sentence that names the columns that there are."""
    return f"there is no text_column={text_column!r}; name one of {', '.join(map(repr, columns)) or 'no columns'}"


def _check_text(text: object, where: str, text_column: str) -> None:
    if not isinstance(text, str):
        found = type(text).__name__
        raise ValueError(f"{where}: text_column={text_column!r} holds no text ({found}); leave the record out")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell out half a character
        raise ValueError(f"{where}: text_column={text_column!r} is not Unicode ({error}); repair the record") from error


def decoded(data: bytes, source: object) -> str:
    """Bytes as text in UTF-8; a byte order mark at the beginning is left out.

    Raises:
        ValueError: they are none; the message names the source.
    """
    remedy = "convert it to UTF-8, or take it out of the source"
    if b"\0" in data:
        raise ValueError(f"{source}: is not UTF-8 text (it has NUL bytes); {remedy}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: is not UTF-8 text ({error}); {remedy}") from error


def _json_records(path: Path, text_column: str) -> Iterator[tuple[str, object]]:
    """Place and contents of every JSON line (its error where it is none), or of every entry of the file's one list."""
    try:
        with COMPRESSED.get(path.suffix.lower(), open)(path, "rb") as file:
            # A list has no lines to be read one by one: it is read as a whole.
            if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                file.seek(0)
                yield from ((f"{path}, entry {n}", entry) for n, entry in enumerate(_parsed(file.read(), path, path)))
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parsed_or_error(line, where, path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); write the file again") from error


def _parsed(data: bytes, where: object, path: Path) -> Any:
    try:
        return json.loads(decoded(data, path))
    except json.JSONDecodeError as error:
        remedy = "repair it (one JSON object per line, or one list of them) or leave it out"
        raise ValueError(f"{where}: is not JSON ({error}); {remedy}") from error


def _parsed_or_error(data: bytes, where: str, path: Path) -> Any:
    try:
        return _parsed(data, where, path)
    except ValueError as error:
        return error


def _parquet_records(path: Path, text_column: str) -> Iterator[tuple[str, dict]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_column not in file.schema_arrow.names:
                raise ValueError(f"{path}: {missing_column(text_column, file.schema_arrow.names)}")
            row = 0
            for batch in file.iter_batches(batch_size=100, columns=[text_column]):
                for record in batch.to_pylist():
                    yield f"{path}, row {row}", record
                    row += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: is not a readable parquet file ({error}); write the file again") from error
