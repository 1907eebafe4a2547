"""SHA-256 of values and files, by which contents are told apart."""

import hashlib
import json
from pathlib import Path


def digest(value: object) -> str:
    """SHA-256 of a plain JSON value; the order of the keys of mappings does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read in small pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
