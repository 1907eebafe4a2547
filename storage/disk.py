"""The disk: its room, and files that are there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .claims import claimed


def check_disk_space(folder: Path, needed: int, what: str) -> None:
    """Check that a disk has room, before anything is written.

    Args:
        folder: where it is going to be written; need not exist yet.
        needed: bytes.
        what: for the message.

    Raises:
        OSError: there are fewer bytes than needed.
    """
    existing = next(path for path in [Path(folder).absolute(), *Path(folder).absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder}: {what} needs {needed} bytes, but its disk has only {free} left. Make room or choose another "
            "folder."
        )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; it is on the disk when this returns. Its folder is made where it is missing."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object, indent: int = 1) -> None:
    """Write a plain value as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """The value in a JSON file.

    Args:
        remedy: what to do where it is damaged, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}); {remedy}") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the name `path` when all of it is on the disk.

    The folder is made where it is missing. After an exception `path` is as it was, and the temporary file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of this process's own: of several that write the file at once, the last one's is there in the end, whole.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(folder: Path) -> None:
    """Check that a folder, which may be missing, can be put in place at once when it is complete.

    Raises:
        OSError: it is the folder at which a disk is mounted, whose name no other folder can take.
    """
    if Path(folder).resolve().is_mount():
        raise OSError(f"{folder}: a disk is mounted there, so that it cannot be replaced; name a new folder in it")


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to write to, which takes its name when all of it is on the disk.

    `path` may be an empty folder, or a link to one. After an exception it is as it was, and the temporary folder is
    gone.

    Raises:
        OSError: `path` is a disk's own folder.
        ValueError: another process is writing it.
    """
    check_replaceable(path)
    with claimed(path), part_of_folder(path.resolve()) as part:
        yield part


@contextmanager
def part_of_folder(path: Path) -> Iterator[Path]:
    """As `folder_written_whole`, for a folder that only the caller writes, empty or gone at the end of the block."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    try:
        yield part
        follow_umask(part)
        for written in [*part.rglob("*"), part]:
            flush_to_disk(written)
        os.replace(part, path)
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Give all files of a folder that this process has made the permissions that its umask leaves.

    safetensors writes its files for their owner alone. The folder's own permissions tell the umask, which could only be
    asked for by changing it, for all threads of the process.
    """
    permissions = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(permissions)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and no longer only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
