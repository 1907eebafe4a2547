"""From the name of a source (files, folders, datasets of the Hub) to documents."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, IterableDataset, Value
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from ..storage.cached_folder import cached_folder
from ..storage.digests import file_digest
from ..storage.disk import check_disk_space
from .addresses import is_address, load_address
from .corpus import standard_library_documents
from .files import COMPRESSED, KINDS, TEXT, documents_of_files, file_kind, file_texts, missing_column
from .packages import listed_package_documents, listed_packages_state

FORMAT, MANIFEST, DOCUMENTS = 1, "manifest.json", "documents.arrow"
STANDARD_LIBRARY, PYTHON_PACKAGES = "standard-library", "python-packages"
BUILT_IN = (STANDARD_LIBRARY, PYTHON_PACKAGES)
PATH_SUFFIXES = {*KINDS, *COMPRESSED, ".txt", ".text", ".md"}


def load_documents(
    source: str | Path,
    *,
    cache_folder: Path,
    text_column: str = "text",
    split: str = "train",
    configuration: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Documents of a source, in its order, with memory that does not grow with it.

    Args:
        source: `"standard-library"` (its files); `"python-packages"` (long documents, see `data.packages`); a file
            (`.jsonl`, `.json`, also compressed, or `.parquet`: one document per record; any other: the whole file is
            one document); a folder (all files below it in the order of their path, hidden ones left out); the address
            of such files of one kind, as s3://bucket/folder (see `data.addresses`); or the name of a dataset for
            `datasets.load_dataset`.
        cache_folder: where the documents are written to.
        text_column: of the records, or of the dataset.
        split, configuration: of a dataset.
        streaming: read while training instead of writing the documents to the cache first.

    Returns:
        Column `text`; `path` as well where every document is a whole file.

    Raises:
        FileNotFoundError: the source looks like a path, and there is nothing.
        ValueError: there is no text in it, a file is not what its suffix says, the text column is missing, or the name
            is not one of a dataset that can be loaded.
        ImportError: the package for this kind of address is not installed.
        OSError: there is too little space on the disk, or the address cannot be reached.
    """
    path, address = Path(source).expanduser(), is_address(source)
    if not address and source not in BUILT_IN and not path.exists() and not looks_like_path(source):
        return _load_dataset(str(source), text_column, split, configuration, streaming, Path(cache_folder))
    if split != "train" or configuration is not None:
        raise ValueError(
            f"split={split!r}, configuration={configuration!r}: only a dataset of the Hub has them, which "
            f"source={source} is not; leave them out"
        )
    if address:
        return _with_text(load_address(str(source), streaming, Path(cache_folder)), source, text_column)
    if source in BUILT_IN:
        listed = source == PYTHON_PACKAGES
        documents = listed_package_documents(Path(cache_folder)) if listed else standard_library_documents()
        return documents.to_iterable_dataset() if streaming else documents
    return _load_files(path, text_column, streaming, Path(cache_folder))


def source_state(source: str | Path) -> str:
    """What tells whether a source has changed, without reading it: SHA-256 of the names, sizes and times of its files.

    A data set of the Hub, or an address, is told by its name alone.
    """
    path = Path(source).expanduser()
    if source == PYTHON_PACKAGES:
        return f"{source} {listed_packages_state()}"
    if source == STANDARD_LIBRARY or not path.exists():
        return str(source)
    root, files = files_of_source(path)
    facts = [(file.relative_to(root).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def path_or_id(name: str | Path, argument: str) -> Path | None:
    """The path of a model or tokenizer that is here; None for an id of the Hub.

    Args:
        argument: what the caller calls it, for the message.

    Raises:
        FileNotFoundError: the name looks like a path, and there is nothing.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if looks_like_path(name):
        remedy = "correct the path" + ("" if isinstance(name, Path) else ", or give an id of the Hub")
        raise FileNotFoundError(f"{argument}={name}: there is no such folder; {remedy}")
    return None


def looks_like_path(source: str | Path) -> bool:
    """Whether a name that is not there is meant as a path: datasets and models are called `name` or `owner/name`."""
    name = str(source)
    return (
        isinstance(source, Path)
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
        or Path(name).suffix.lower() in PATH_SUFFIXES
    )


def _load_files(path: Path, text_column: str, streaming: bool, cache_folder: Path) -> Dataset | IterableDataset:
    root, files = files_of_source(path)
    for file in files:
        if file_kind(file) != TEXT:
            next(file_texts(file, text_column), None)  # a file of another make is found before all others are read
    whole_files = all(file_kind(file) == TEXT for file in files)
    arguments: dict[str, Any] = {"files": files, "root": root, "text_column": text_column, "with_paths": whole_files}
    _check_some_text((document["text"] for document in documents_of_files(**arguments)), path)
    # Offsets of 64 bits: a batch of long documents may have more than 2 GiB.
    features = Features({column: Value("large_string") for column in (["path"] if whole_files else []) + ["text"]})
    if streaming:
        return IterableDataset.from_generator(documents_of_files, features=features, gen_kwargs=arguments)
    folder = cache_folder / "documents" / _digest(files, root, text_column)

    def build(part: Path) -> dict:
        check_disk_space(part, sum(file.stat().st_size for file in files), "a copy of the documents")
        with ArrowWriter(features=features, path=str(part / DOCUMENTS), writer_batch_size=100) as writer:
            for document in tqdm(documents_of_files(**arguments), desc="Reading", unit=" documents", unit_scale=True):
                writer.write(document)
            count, _ = writer.finalize()
        return {"format": FORMAT, "documents": count}

    cached_folder(folder, MANIFEST, build)
    return Dataset.from_file(str(folder / DOCUMENTS))


def files_of_source(path: Path) -> tuple[Path, list[Path]]:
    """The folder, and all files below it in the order of their path, hidden ones left out; of a file itself alone.

    Raises:
        FileNotFoundError, ValueError: there is nothing, or no file in it.
    """
    if path.is_file():
        return path.parent, [path]
    if not path.exists():
        raise FileNotFoundError(f"source={path}: there is no such file or folder; correct the path")
    if not path.is_dir():
        raise ValueError(f"source={path}: is neither a file nor a folder; name one of them")
    below = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    visible = sorted(file.as_posix() for file in below if not any(part.startswith(".") for part in file.parts))
    if not visible:
        raise ValueError(f"source={path}: no file below it (hidden ones do not count); name a folder with text files")
    return path, [path / name for name in visible]


def _digest(files: list[Path], root: Path, text_column: str) -> str:
    """SHA-256 of the contents: a file that was changed in place must not be taken from the cache."""
    digest = hashlib.sha256(f"{FORMAT} {text_column}".encode())
    for file in files:
        digest.update(os.fsencode(file.relative_to(root).as_posix()) + b"\0" + bytes.fromhex(file_digest(file)))
    return digest.hexdigest()


def _load_dataset(
    name: str, text_column: str, split: str, configuration: str | None, streaming: bool, cache_folder: Path
) -> Dataset | IterableDataset:
    try:
        loaded = datasets.load_dataset(
            name,
            configuration,
            split=split,
            streaming=streaming,
            cache_dir=str(cache_folder / "datasets"),
            keep_in_memory=False,
        )
    except Exception as error:
        raise ValueError(
            f"source={name!r}, configuration={configuration!r}, split={split!r}: there is no such file or folder, and "
            f"it could not be loaded as a dataset ({error}); correct the name, or look at the cause above"
        ) from error
    return _with_text(loaded, name, text_column)


def _with_text(loaded: Dataset | IterableDataset, source: str | Path, text_column: str) -> Dataset | IterableDataset:
    """The column with the texts alone, as `text`."""
    columns = loaded.column_names
    if columns is None:  # a stream does not know before its first example
        columns = list(next(iter(loaded), {text_column: ""}))
    if text_column not in columns:
        raise ValueError(f"source={str(source)!r}: {missing_column(text_column, columns)}")
    documents = loaded.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    _check_some_text((document["text"] for document in documents), source)
    return documents


def _check_some_text(texts: Iterable[str | None], source: str | Path) -> None:
    if not any(texts):
        raise ValueError(f"source={source}: there is no text in it, or every document is empty; name one with text")
