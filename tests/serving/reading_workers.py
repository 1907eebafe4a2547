"""Processes that read many documents, one of which dies in the middle of writing a context."""

import os
from pathlib import Path

from ttt_e2e.serving import ManyDocuments, ReadingRequest
from ttt_e2e.storage import disk

from ..training.processes import kill_self


def request(place: Path, output: Path, **options) -> ReadingRequest:
    """To read the documents in `place/documents` by the model in `place/model`."""
    options = {"documents": str(place / "documents")} | options
    return ReadingRequest(model=str(place / "model"), output=output, cache=place / "cache", **options)


def outcomes(request: ReadingRequest) -> list:
    reading = ManyDocuments(request)
    return list(reading.read(reading.shared_out()))


def worker(place: Path, output: Path, process: int, processes: int, dies_at: int | None = None) -> None:
    """Read as one of several processes; leave the names of what was read in a file.

    Args:
        dies_at: the number of the context, counted from 1, in whose middle the process is killed.
    """
    if dies_at is not None:
        _die_at(dies_at)
    found = outcomes(request(place, output, process=process, processes=processes))
    read = [outcome.name for outcome in found if outcome.tokens]
    (place / f"{output.name}-{process}.txt").write_text("\n".join(read))


def _die_at(count: int) -> None:
    """Kill this process when the files of a context are written, and lie in folders that have no names yet."""
    replace, contexts = os.replace, []

    def replaced(source, target):
        if Path(source).is_dir():
            if len(contexts) == count - 1:
                kill_self()
            if not any(name.startswith(".") for name in Path(target).parts[-2:]):
                contexts.append(target)
        replace(source, target)

    disk.os.replace = replaced
