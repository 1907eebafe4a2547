"""What a run was asked for, as a file in its folder: so that it is resumed as it was begun, and nothing is mixed."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from .disk import write_json

RECORD = "run.json"
MODEL = "model"  # the folder of a run that holds its model


def check_output(folder: Path, resume: bool, besides: Collection[str] = ()) -> None:
    """Check the run's folder: empty for a new run, with a record for one that is resumed.

    Args:
        besides: names of files that count as nothing.

    Raises:
        ValueError: it is not.
    """
    if resume and not (folder / RECORD).is_file():
        raise ValueError(f"output={str(folder)!r} holds no run to resume (no {RECORD}): start one without --resume")
    if (
        not resume
        and folder.exists()
        and (not folder.is_dir() or any(path.name not in besides for path in folder.iterdir()))
    ):
        is_run = (folder / RECORD).is_file()
        remedy = "choose another folder" + (", or go on with the run there with --resume" if is_run else "")
        raise ValueError(
            f"output={str(folder)!r} holds {'another run' if is_run else 'other files'}: {remedy}. Nothing was "
            "overwritten."
        )
    above = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"output={str(folder)!r}: {above} is no folder that can be written to; choose another one")


def write_record(folder: Path, record: dict, asked: dict) -> None:
    """Write the record of a new run.

    Args:
        record: all that decides what the run computes, as plain values.
        asked: how it was called; for the reader, never compared.
    """
    write_json(folder / RECORD, {"asked": asked, **record})


def check_record(folder: Path, record: dict) -> None:
    """Check that a run is resumed as it was begun.

    Raises:
        ValueError: naming the first difference, or the record is damaged.
    """
    try:
        begun = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        begun.pop("asked")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"output={str(folder)!r}: its {RECORD} is damaged ({error!r}), so that the run cannot be resumed safely; "
            "load the last checkpoint's folder as a model and begin a new run"
        ) from error
    difference = first_difference(begun, json.loads(json.dumps(record)))
    if difference is not None:
        name, before, after = difference
        if name.startswith("data."):
            before, after = "other texts", "these (or their tokenizer)"
        raise ValueError(
            f"output={str(folder)!r}: its run was begun with {name}={before!r}, but now it is {after!r}. Resume it as "
            "it was begun, or start a new run in another folder. Nothing was overwritten."
        )


def first_difference(one: dict, other: dict, above: str = "") -> tuple[str, object, object] | None:
    """Where two nested mappings differ first: the dotted name and both values, None for a missing one.

    A setting that the earlier mapping `one` does not have came with a later version; where it is off (false, 0 or
    empty) it changes nothing and is no difference.
    """
    for name in sorted(one.keys() | other.keys()):
        before, after = one.get(name), other.get(name)
        if name not in one and not after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found = first_difference(before, after, f"{above}{name}.")
            if found is not None:
                return found
        elif before != after:
            return f"{above}{name}", before, after
    return None


def saved_folder(path: Path, file: str = "config.json") -> Path | None:
    """The folder itself, or `model` in it, as runs have it: where a file of a saved model is; None if in neither."""
    return next((folder for folder in (path, path / MODEL) if (folder / file).is_file()), None)
