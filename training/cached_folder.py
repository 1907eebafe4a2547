"""Folders that are written once, under the hash of all that they come from, and checked before each use."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from transformers.utils import logging

from .disk import flush_to_disk

logger = logging.get_logger(__name__)


def cached_folder(folder: Path, manifest_name: str, build: Callable[[Path], dict]) -> None:
    """Make sure that `folder` is there, whole and undamaged; build it where it is not.

    It is built under a temporary name and renamed when every byte is on the disk, so that it appears whole or not at
    all. Of several processes that want the same folder, one builds it and the others wait for that one.

    Args:
        folder: its name is the hash of all that the contents depend on.
        manifest_name: of the file that holds the facts, and size and digest of every other file.
        build: writes the files into the (empty) folder that it is given and returns the facts for the manifest.
    """
    if damage(folder, manifest_name) is None:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The operating system frees the lock of a process that was killed.
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        found = damage(folder, manifest_name)
        if found is None:
            return
        if folder.exists():
            logger.warning(f"{folder} is damaged ({found}); it is built again.")
        _build(folder, manifest_name, build)


def damage(folder: Path, manifest_name: str) -> str | None:
    """What is wrong with a folder, in words; None where all is well. Reads every byte of it."""
    try:
        manifest = json.loads((folder / manifest_name).read_text(encoding="utf-8"))
        if manifest["checksum"] != _checksum(manifest):
            return f"{manifest_name} does not match its checksum"
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _digest(folder / name) != expected["sha256"]:
                return f"{name} does not match its digest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest_name}, or a file that it names, cannot be read: {error!r}"
    return None


def _build(folder: Path, manifest_name: str, build: Callable[[Path], dict]) -> None:
    part = folder.with_name(f"{folder.name}.part")
    if part.exists():
        shutil.rmtree(part)  # of a process that was killed: whoever holds the lock is the only one who builds
    part.mkdir()
    try:
        facts = build(part)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(part.iterdir())}
        manifest = {**facts, "files": files}
        manifest["checksum"] = _checksum(manifest)
        (part / manifest_name).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in [*part.iterdir(), part]:
            flush_to_disk(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
        flush_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: dict) -> str:
    facts = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
