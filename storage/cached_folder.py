"""Folders that are written once, under the hash of all that they come from, and checked before each use."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from transformers.utils import logging

from .disk import part_of_folder
from .manifest import damage, write_manifest

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
        with part_of_folder(folder) as part:  # whoever holds the lock is the only one who builds
            write_manifest(part, manifest_name, build(part))
            if folder.exists():
                shutil.rmtree(folder)
