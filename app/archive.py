"""A learned context as one file: a zip archive of what `write_context` writes into a folder.

Unpacked, it is such a folder, for `ttt-e2e chat --context` and all the rest. An archive may come from a stranger: names
and sizes are checked before anything is unpacked, and the files are read as `open_context` reads those of strangers.
"""

import tempfile
import zipfile
import zlib
from pathlib import Path

from .. import TTTE2EForCausalLM
from ..serving import StoredContext, open_context, write_context

FILES = {"context.safetensors", "context.json", "documents.json"}
LARGEST = 512 * 2**20  # bytes, unpacked
REMEDY = "choose a file that this page has saved"


def pack_context(context: StoredContext, path: Path) -> None:
    """Write a context as a zip file; equal contexts give equal bytes.

    Raises:
        ValueError: nothing has been read.
        OSError: the disk is full.
    """
    if not context.tokens:
        raise ValueError("Nothing has been read yet: read a document, then save")
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        folder = Path(temporary) / "context"
        write_context(folder, context)
        with zipfile.ZipFile(path, "w") as archive:  # fast weights hardly get smaller
            for file in sorted(folder.iterdir()):
                archive.writestr(zipfile.ZipInfo(file.name), file.read_bytes())


def unpack_context(path: Path, model: TTTE2EForCausalLM, largest: int = LARGEST) -> StoredContext:
    """Load a context from a zip file onto the model's device.

    Args:
        largest: bytes that the archive may hold, unpacked.

    Raises:
        ValueError: no such archive; damaged, forged, too large, or of another model.
        OSError: it cannot be read or unpacked.
    """
    name = repr(path.name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "context"
        folder.mkdir()
        try:
            with zipfile.ZipFile(path) as archive:
                for member in _checked_members(archive, largest):
                    # A member gives no more bytes than its entry says.
                    (folder / member.filename).write_bytes(archive.read(member))
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{name} is no learned context, or is damaged ({error}); {REMEDY}") from error
        except ValueError as error:
            raise ValueError(f"{name} {error}; {REMEDY}") from error
        try:
            return open_context(folder, model)
        except (ValueError, FileNotFoundError) as error:
            said = str(error).replace(f"in {folder}", f"in {name}").replace(f"({folder})", name)
            if "was read with" in said:
                said += (
                    " Choose the model that has read it, then load the file again; or read the text with this model."
                )
            raise ValueError(said) from error


def _checked_members(archive: zipfile.ZipFile, largest: int) -> list[zipfile.ZipInfo]:
    """The members of an archive: plain files of a context and nothing else.

    Raises:
        ValueError: what is wrong, to be said after the archive's name.
    """
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) != len(names) or not set(names) <= FILES:
        wrong = next((name for name in names if name not in FILES), "one file twice")
        raise ValueError(f"holds {wrong[:80]!r}, but a learned context is {', '.join(sorted(FILES))} and nothing else")
    if missing := sorted(FILES - {"documents.json"} - set(names)):
        raise ValueError(f"is no learned context: {missing[0]} is missing")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("is packed in a way that is not read here (only stored and deflated)")
    total = sum(member.file_size for member in members)
    if total > largest:
        raise ValueError(f"holds {total:,} bytes, more than the {largest:,} that are read here")
    return members
