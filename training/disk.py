"""Room on the disk."""

import shutil
from pathlib import Path


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
