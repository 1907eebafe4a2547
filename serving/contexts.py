"""Learned contexts as folders: what a model has learned from documents or a conversation, to go on from later.

A folder holds what `TTTE2ECache.save_pretrained` writes (and can be loaded with `TTTE2ECache.from_pretrained`), and
`documents.json`, which says what was read.
"""

import glob
import json
import os
import shutil
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import TTTE2ECache, TTTE2EForCausalLM
from ..model_cards.card import sequence_memory
from ..storage.disk import check_disk_space, check_replaceable, folder_written_whole
from ..storage.record import check_output

DOCUMENTS, COUNTERS = "documents.json", "context.json"


@dataclass(frozen=True)
class ReadDocument:
    """A name for the reader, and how many tokens were read under it."""

    name: str
    tokens: int


@dataclass(frozen=True)
class StoredContext:
    """A learned context of one sequence, and what it comes from.

    Attributes:
        cache: has read everything below.
        documents: in the order in which they were read.
        answer_end: the last characters of a conversation's last answer; None when there was no conversation.
    """

    cache: TTTE2ECache
    documents: tuple[ReadDocument, ...] = ()
    answer_end: str | None = None

    @classmethod
    def new(cls, model: TTTE2EForCausalLM) -> "StoredContext":
        """Nothing has been read."""
        return cls(TTTE2ECache(model.config))

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return 0 if self.cache.context is None else self.cache.context.tokens[0]

    def fork(self) -> "StoredContext":
        """The same, to read on with; this one stays as it is."""
        return replace(self, cache=self.cache.fork())


def write_context(folder: Path, context: StoredContext) -> None:
    """Write a context; the folder appears whole or not at all.

    Raises:
        ValueError: the folder holds something, nothing has been read, or the model's weights have changed since.
        OSError: the disk is full.
    """
    check_output(folder, resume=False)
    check_disk_space(folder, context.cache.nbytes, "the learned context")
    with folder_written_whole(Path(folder)) as new:
        for remains in new.parent.glob(f".{glob.escape(new.name)}.*"):
            shutil.rmtree(remains, ignore_errors=True)  # of a process that was killed in the next line
        context.cache.save_pretrained(new)
        facts = {
            "tokens": context.tokens,
            "documents": [asdict(document) for document in context.documents],
            "answer_end": context.answer_end,
        }
        (new / DOCUMENTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_room(folder: Path, model: TTTE2EForCausalLM, tokens: int) -> None:
    """Check, before anything is read, that a context can be written to a folder afterwards.

    Args:
        tokens: that it will have read.

    Raises:
        ValueError: the folder holds something.
        OSError: its disk has no room, or is mounted there.
    """
    check_output(folder, resume=False)
    check_replaceable(folder)
    memory = sequence_memory(model.config, model.dtype)
    needed = memory.fast_weights + memory.window + memory.per_token * tokens
    check_disk_space(folder, needed, "the learned context")


def open_context(folder: Path, model: TTTE2EForCausalLM) -> StoredContext:
    """Load a context onto the model's device. One without `documents.json` is opened, too.

    Raises:
        FileNotFoundError: there is no learned context in the folder.
        ValueError: it is damaged, belongs to other weights, or holds several sequences.
    """
    folder = Path(folder)
    cache = TTTE2ECache.from_pretrained(folder, model)
    if cache.batch_size != 1:
        raise ValueError(
            f"The learned context in {folder} holds {cache.batch_size} sequences; keep one of them "
            "(cache.batch_select_indices) and save it anew."
        )
    if not (folder / DOCUMENTS).exists():
        return StoredContext(cache)
    try:
        facts = json.loads((folder / DOCUMENTS).read_text(encoding="utf-8"))
        documents = tuple(ReadDocument(str(one["name"]), int(one["tokens"])) for one in facts["documents"])
        answer_end = facts["answer_end"]
        if not isinstance(answer_end, str | None):
            raise ValueError(f"answer_end is {answer_end!r}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"The learned context in {folder} is damaged ({DOCUMENTS}: {error!r}): read the text again, then save."
        ) from error
    return StoredContext(cache, documents, answer_end)


def _holds_its_files(folder: Path) -> bool:
    """Whether a folder and all that it holds lie there themselves: a symbolic link would lead out, a pipe nowhere."""
    try:
        return not folder.is_symlink() and all(
            entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False) for entry in os.scandir(folder)
        )
    except OSError:  # gone meanwhile, or not ours to read
        return False


class ContextFolder:
    """The learned contexts in one folder, by the names of their sub-folders. Safe to use from several threads.

    Symbolic links in it are not followed.

    Args:
        folder: None when there are none.
        model: they are loaded for it.
        kept: contexts that stay in memory, the last used ones.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: Path | None, model: TTTE2EForCausalLM, kept: int = 4):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"contexts={str(folder)!r}: there is no such folder; correct the path")
        self.folder, self.model, self.kept = folder, model, kept
        self._loaded: OrderedDict[tuple[str, int], StoredContext] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Names of all contexts, sorted; hidden folders, links and names that cannot be printed do not count."""
        if self.folder is None:
            return []
        found = (path.parent for path in self.folder.glob(f"[!.]*/{COUNTERS}"))
        return sorted(folder.name for folder in found if folder.name.isprintable() and _holds_its_files(folder))

    def open(self, name: str) -> StoredContext:
        """A context of one's own: reading on with it changes neither the files nor what others get.

        Raises:
            KeyError: there is no context of that name.
            ValueError: it is damaged, or belongs to other weights.
        """
        if name not in self.names():  # so that no name leads out of the folder
            raise KeyError(name)
        with self._lock:
            key = (name, (self.folder / name / COUNTERS).stat().st_mtime_ns)
            if key not in self._loaded:
                self._loaded[key] = open_context(self.folder / name, self.model)
            self._loaded.move_to_end(key)
            while len(self._loaded) > self.kept:
                self._loaded.popitem(last=False)
            return self._loaded[key].fork()
