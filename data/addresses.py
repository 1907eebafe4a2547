"""Documents in object storage and elsewhere, by the address of a file, a pattern or a folder: whatever fsspec knows."""

from pathlib import Path

import datasets
import fsspec
from datasets import Dataset, IterableDataset
from fsspec.core import url_to_fs

from .files import JSON, PARQUET, TEXT, file_kind

HUB = "hf"
# What `datasets` calls the readers of each kind of file.
READERS: dict[str, dict] = {
    JSON: {"path": "json"},
    PARQUET: {"path": "parquet"},
    TEXT: {"path": "text", "sample_by": "document"},
}
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def is_address(source: str | Path) -> bool:
    """Whether a source is an address, as s3://bucket/folder; `Path` would make s3:/bucket/folder of it."""
    scheme, separator, _ = str(source).partition("://")
    return bool(separator) and scheme.replace("+", "").isalnum() and not Path(source).exists()


def check_address(source: str | Path) -> None:
    """Check that files can be read by a source's address, where it is one, without reaching for it.

    Raises:
        ValueError: there is no such kind of address, or it is one of the Hub, whose data sets have names.
        ImportError: the package for this kind is not installed.
    """
    if not is_address(source):
        return
    scheme, _, rest = str(source).partition("://")
    if scheme.lower() == HUB:
        name = rest.removeprefix("datasets/") or "owner/name"
        raise ValueError(f"source={str(source)!r}: give the data set's name alone, as {name}")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = PACKAGES.get(scheme, f"what fsspec needs for {scheme}://")
        raise ImportError(
            f"source={str(source)!r}: {error}: install {package}, or download it and give the path"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"source={str(source)!r}: {error}; give a path, or an address as s3://bucket/folder"
        ) from error


def load_address(source: str, streaming: bool, cache_folder: Path) -> Dataset | IterableDataset:
    """The records of the files at an address, in the order of their paths, with the columns that they have.

    Args:
        source: of a file, a folder (all files below it, hidden ones left out) or a pattern, as
            s3://bucket/folder/*.parquet. Access is what fsspec finds in the environment.
        streaming: read while they are asked for; otherwise they are written to the cache folder first.

    Raises:
        ValueError: there is no such kind of address; the files are of several kinds, or cannot be read.
        FileNotFoundError: there is no file.
        ImportError: the package for this kind is not installed.
        OSError: the address cannot be reached.
    """
    check_address(source)
    files = _files_at(source)
    kinds = sorted({file_kind(Path(file)) for file in files})
    if len(kinds) > 1:
        raise ValueError(f"source={source!r}: it holds files of several kinds ({', '.join(kinds)}); name those of one")
    try:
        return datasets.load_dataset(
            **READERS[kinds[0]],
            data_files=files,
            split="train",
            streaming=streaming,
            cache_dir=str(cache_folder / "datasets"),
        )
    except Exception as error:  # whatever the file system and the reader raise
        raise ValueError(f"source={source!r}: cannot be read ({error}); look at the cause above") from error


def _files_at(source: str) -> list[str]:
    """Addresses of the files, in the order of their paths."""
    try:
        filesystem, path = url_to_fs(source)
        if "*" in path:
            found = [name for name in filesystem.glob(path) if filesystem.isfile(name)]
        else:
            found = filesystem.find(path) if filesystem.isdir(path) else [path] * filesystem.exists(path)
        root = path.rpartition("*")[0].rpartition("/")[0] if "*" in path else path
    except Exception as error:  # every file system has errors of its own
        advice = "check the address, the network and your access, or download it and give the path"
        raise OSError(f"source={source!r}: cannot be read ({type(error).__name__}: {error}); {advice}") from error
    visible = [name for name in found if not any(part.startswith(".") for part in name.removeprefix(root).split("/"))]
    if not visible:
        raise FileNotFoundError(f"source={source!r}: there is no file; correct the address")
    return [filesystem.unstrip_protocol(name) for name in sorted(visible)]
