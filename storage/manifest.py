"""A manifest in a folder: size and SHA-256 of every file of it, written last and checked before use."""

import json
import os
from pathlib import Path

from .digests import digest, file_digest
from .disk import flush_to_disk, write_json


def write_manifest(folder: Path, name: str, facts: dict | None = None) -> None:
    """Declare a folder complete, once all its files are on the disk.

    Args:
        name: of the manifest's own file, which may be there already and is replaced.
        facts: written into it as well; plain values.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / name)
    for path in paths:
        flush_to_disk(path)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in paths
    }
    manifest = {**(facts or {}), "files": files}
    write_json(folder / name, {**manifest, "checksum": digest(manifest)})


def has_sizes(folder: Path, name: str) -> bool:
    """Whether the manifest and all its files are there, of their sizes; reads none of them, and so is no proof."""
    try:
        files = json.loads((folder / name).read_text(encoding="utf-8"))["files"]
        return bool(files) and all((folder / file).stat().st_size == files[file]["bytes"] for file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def damage(folder: Path, name: str) -> str | None:
    """What is wrong with a folder, in words; None where all is well. Reads every byte of it, in small pieces."""
    try:
        manifest = json.loads((folder / name).read_text(encoding="utf-8"))
        if "checksum" not in manifest:
            return f"{name} holds no checksum"
        if manifest.pop("checksum") != digest(manifest):
            return f"{name} does not match its checksum"
        if not manifest["files"]:
            return f"{name} names no files"
        for file, expected in manifest["files"].items():
            size = (folder / file).stat().st_size
            if size != expected["bytes"]:
                return f"{file} has {size} bytes instead of {expected['bytes']}"
            if file_digest(folder / file) != expected["sha256"]:
                return f"{file} does not match its digest"
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name}, or a file that it names, cannot be read: {error!r}"
    return None
