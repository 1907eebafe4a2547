"""Real long text that every machine has: the source files of the running Python's standard library."""

import sysconfig
from collections.abc import Collection
from pathlib import Path

from datasets import Dataset

from .texts import text_batches

NOT_OF_THE_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


def standard_library_documents(root: Path | None = None) -> Dataset:
    """Source files of the standard library, in the order of their path; tests and installed packages left out.

    Args:
        root: folder to read instead of the running Python's own.

    Returns:
        Columns `path` (relative to the root, with forward slashes) and `text`.

    Raises:
        FileNotFoundError: the folder holds no source file. (Some Pythons keep their library in an archive.)
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    relative_paths = (path.relative_to(root) for path in root.rglob("*.py"))
    paths = sorted(path.as_posix() for path in relative_paths if NOT_OF_THE_LIBRARY.isdisjoint(path.parts))
    if not paths:
        raise FileNotFoundError(f"root={root}: no Python source file below it; run with a Python that has its sources")
    # A few files of the library are written in another encoding; what is not UTF-8 in them does not matter here.
    texts = [(root / path).read_text(encoding="utf-8", errors="replace") for path in paths]
    return Dataset.from_dict({"path": paths, "text": texts})


def split_documents(
    documents: Dataset, validation_every: int, training_only: Collection[str] = (), whole_folders: bool = False
) -> tuple[Dataset, Dataset]:
    """Split by whole documents: each n-th one in order of size goes to validation, so that both parts have all sizes.

    Args:
        documents: columns `text`, and `path` where training_only names folders.
        validation_every: n of "each n-th"; the share of validation is 1/n.
        training_only: folders whose documents never go to validation.
        whole_folders: keep all documents of a folder, the first one of their path, on the same side; n then counts
            folders.

    Returns:
        Training and validation documents, each in the order given.

    Raises:
        ValueError: validation_every is below 2, there are too few documents for one of validation, or training_only
            or whole_folders is given for documents without paths.
    """
    if validation_every < 2:
        raise ValueError(f"validation_every={validation_every}: must be at least 2, or nothing is left to train on")
    candidates = _outside(documents, training_only)
    folders: list = _first_folders(documents) if whole_folders else list(range(len(documents)))
    sizes: dict[int | str, int] = {}
    texts = (text for batch in text_batches(documents) for text in batch)
    for folder, text in zip(folders, texts, strict=True):
        sizes[folder] = sizes.get(folder, 0) + len(text)
    # The middle of each group of n: the very largest stays in training, the validation has one of the next.
    by_size = sorted(dict.fromkeys(folders[row] for row in candidates), key=lambda folder: -sizes[folder])
    chosen = set(by_size[validation_every // 2 :: validation_every])
    validation = {row for row in candidates if folders[row] in chosen}
    if not validation:
        raise ValueError(
            f"documents: {len(candidates)} are too few to keep each {validation_every}th for validation; give more "
            "documents, or none for validation (--set data.validation_every=null, --validation-data for other ones)"
        )
    training = [row for row in range(len(documents)) if row not in validation]
    return documents.select(training), documents.select(sorted(validation))


def _first_folders(documents: Dataset) -> list[str]:
    """The first folder of each document's path."""
    if "path" not in documents.column_names:
        raise ValueError("whole_folders=True: the documents have no column `path` to tell their folder by; give files")
    return [path.partition("/")[0] for path in documents["path"]]


def _outside(documents: Dataset, folders: Collection[str]) -> list[int]:
    """Numbers of the documents that are in none of the folders."""
    if not folders:
        return list(range(len(documents)))
    if "path" not in documents.column_names:
        raise ValueError(
            f"training_only={list(folders)}: the documents have no column `path` to tell their folder by; "
            "leave training_only empty, or give files"
        )
    prefixes = tuple(f"{folder}/" for folder in folders)
    return [row for row, path in enumerate(documents["path"]) if not path.startswith(prefixes)]
