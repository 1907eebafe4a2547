"""Folders to which one process at a time writes.

The claim is a lock of the operating system, which goes with the process however it ends; its file says who holds it.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

RUN_LOCK = ".run.lock"
HELD_BY = "process"


class ClaimedElsewhere(ValueError):
    """Another process has claimed a folder."""


@contextmanager
def claimed(folder: Path, patience: float = 0) -> Iterator[None]:
    """Keep others from writing a folder that appears whole, in the place where it is going to be.

    Within one thread claims of the same folder may be nested.

    Args:
        patience: seconds that another process may still hold it.

    Raises:
        ClaimedElsewhere: another process has claimed it.
        ValueError: nothing can be written there.
    """
    folder = Path(folder).expanduser().resolve()
    with _held(folder.with_name(f".{folder.name}.lock"), folder, patience):
        yield


@contextmanager
def claimed_run(folder: Path) -> Iterator[None]:
    """Keep others from writing to the folder of a run, which is made; an empty one goes again at the end.

    The lock lies in the folder, which alone may be writable, or shared with other machines.

    Raises:
        ClaimedElsewhere: another process has claimed it.
        ValueError: nothing can be written there.
    """
    folder = Path(folder).expanduser().resolve()
    with _held(folder / RUN_LOCK, folder):
        yield


@contextmanager
def _held(path: Path, folder: Path, patience: float = 0) -> Iterator[None]:
    made = [above for above in path.parents if not above.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, is_singleton=True)
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise ClaimedElsewhere(
            f"output={str(folder)!r}: {_note(path) or 'another process'} is writing there; wait for its end, or choose "
            "another folder. Nothing was overwritten."
        ) from error
    except OSError as error:
        raise ValueError(
            f"output={str(folder)!r}: nothing can be written to {path.parent} ({error}); choose another folder"
        ) from error
    try:
        # Where a file system has no locks, filelock writes a note of its own, which is not touched.
        own = _note(path) == "" or _note(path).startswith(HELD_BY)
        if own and lock.lock_counter == 1:
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            path.write_text(f"{HELD_BY} {os.getpid()} on {socket.gethostname()} (since {since})\n", encoding="utf-8")
        yield
    finally:
        last = lock.lock_counter == 1
        if last and own:
            path.unlink(missing_ok=True)  # while it is held: whoever waits for this file finds that it is gone
        lock.release()
        if last:
            _remove_empty(made)


def _note(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return ""


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
