"""Many documents, each into a learned context of its own, by one process or by several.

The processes share nothing but the folder that they write to. Each begins with its own share and goes on with what is
left of the others'. A document is claimed while it is read, so that none is read twice; the operating system frees the
claims of a process that dies. A context appears whole or not at all, and one that is there is not read again.
"""

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .. import TTTE2ECache, TTTE2EForCausalLM
from ..data.named_documents import NamedDocuments
from ..data.tokenizer import separator_id
from ..fingerprints import fingerprint
from ..model_cards.card import sequence_memory
from ..storage.claims import ClaimedElsewhere, claimed
from ..storage.digests import file_digest
from ..storage.disk import check_disk_space
from ..storage.record import RECORD, check_output, check_record, write_record
from .contexts import COUNTERS, DOCUMENTS, ReadDocument, StoredContext, open_context, write_context
from .documents import STEP, check_learns, text_tokens
from .models import load_text_model

logger = logging.get_logger(__name__)

PATIENCE = 60.0  # seconds for others to write the record of the reading
PAUSE = 1.0  # seconds between two looks at documents that others are reading


@dataclass(frozen=True, kw_only=True)
class ReadingRequest:
    """Which documents to read, by which model, and where to write.

    Attributes:
        model: as `load_text_model` takes it, with dtype and device.
        documents: as `NamedDocuments` takes it, with text_column and split.
        output: folder that gets one folder for each document; new, or of the same reading.
        cache: where rows of files and data sets are kept.
        context: a learned context that each document is read after; None for none.
        rows: documents read side by side. More than one changes a context by rounding only.
        process, processes: this process's number, from 0, and how many there are.
        split_special_tokens: as in `encode_texts`.
    """

    model: str
    documents: str
    output: Path
    cache: Path
    context: Path | None = None
    rows: int = 1
    process: int = 0
    processes: int = 1
    dtype: str = "auto"
    device: torch.device | str | None = None
    text_column: str = "text"
    split: str = "train"
    split_special_tokens: bool = True


class DocumentError(ValueError):
    """A document that cannot be read; the others can."""


@dataclass(frozen=True)
class Outcome:
    """What became of a document.

    Attributes:
        name: of the document.
        tokens: that were read now; 0 where its context was there, or it cannot be read.
        error: why it cannot be read; None where its context is there.
    """

    name: str
    tokens: int = 0
    error: str | None = None


class ManyDocuments:
    """The documents of a request, its model, and the folder of their contexts, with the reading's record in it.

    Raises:
        FileNotFoundError, ValueError, OSError: something of the request does not fit; nothing was read.
    """

    def __init__(self, request: ReadingRequest):
        if request.rows < 1:
            raise ValueError(f"rows={request.rows}: must be at least 1")
        _check_outside(request.output, request.documents)
        self.request, self.output = request, request.output
        self.documents = NamedDocuments(
            request.documents, cache_folder=request.cache, text_column=request.text_column, split=request.split
        )
        self.text_model = load_text_model(request.model, dtype=request.dtype, device=request.device)
        model = self.text_model.model
        check_learns(model)
        separator_id(self.text_model.tokenizer)  # raises where no document could begin
        self.start = StoredContext.new(model) if request.context is None else open_context(request.context, model)
        _open_record(request, model)
        left = sum(not self._is_done(number) for number in range(len(self.documents)))
        memory = sequence_memory(model.config, model.dtype)
        check_disk_space(self.output, left * (memory.fast_weights + memory.window), f"room for {left} learned contexts")

    def shared_out(self) -> list[list[int]]:
        """Numbers of the documents that have no context yet, in groups that are read side by side.

        The own share comes first, then what the other processes come to last. Documents of like length are neighbours
        where several are read at once.
        """
        left = [number for number in range(len(self.documents)) if not self._is_done(number)]
        rows, process, processes = self.request.rows, self.request.process, self.request.processes
        if rows > 1:
            left.sort(key=self.documents.size, reverse=True)
        groups = [left[start : start + rows] for start in range(0, len(left), rows)]
        others = [group for index, group in enumerate(groups) if index % processes != process]
        return groups[process::processes] + others[::-1]

    def read(self, groups: Sequence[Sequence[int]]) -> Iterator[Outcome]:
        """Read groups of documents, each group side by side, and wait for those that other processes are reading.

        Yields:
            One outcome for each document, when its context is on the disk.

        Raises:
            ValueError, OSError: a context cannot be written.
        """
        left = [list(group) for group in groups]
        while left:
            before, left = left, []
            for group in before:
                elsewhere = yield from self._read_group(group)
                left += [elsewhere] if elsewhere else []
            if left == before:
                logger.info(f"Waiting for other processes, which are reading {sum(map(len, left))} documents.")
                time.sleep(PAUSE)

    def _read_group(self, group: list[int]) -> Generator[Outcome, None, list[int]]:
        """Returns the numbers of the documents that other processes are reading."""
        elsewhere, ids, model = [], {}, self.text_model.model
        with ExitStack() as claims:
            for number in group:
                name = self.documents.name(number)
                try:
                    if not self._is_there(number):
                        claims.enter_context(claimed(self._folder(number)))
                    if self._is_there(number):  # perhaps since a moment ago
                        yield Outcome(name)
                    else:
                        ids[number] = self._tokens(number)
                except ClaimedElsewhere:
                    elsewhere.append(number)
                except DocumentError as error:
                    yield Outcome(name, error=str(error))
            for number, cache in read_side_by_side(model, self.start.cache, ids, shown=not self.request.process):
                read = ReadDocument(self.documents.name(number), len(ids[number]))
                learned = replace(self.start, cache=cache, documents=(*self.start.documents, read), answer_end=None)
                write_context(self._folder(number), learned)
                yield Outcome(read.name, read.tokens)
        return elsewhere

    def _folder(self, number: int) -> Path:
        return self.output / self.documents.folder_name(number)

    def _is_done(self, number: int) -> bool:
        try:
            return self._is_there(number)
        except DocumentError:  # is told when its turn comes
            return False

    def _is_there(self, number: int) -> bool:
        """Whether the document's context is there.

        Raises:
            DocumentError: its folder holds something else.
        """
        folder, name = self._folder(number), self.documents.name(number)
        if not folder.exists():
            return False
        try:
            read = json.loads((folder / DOCUMENTS).read_text(encoding="utf-8"))["documents"][-1]["name"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DocumentError(f"{name}: {folder} is there and holds no context of it: remove it") from error
        if read != name:
            raise DocumentError(f"{name}: {folder} holds the context of {read}: move it away")
        return True

    def _tokens(self, number: int) -> torch.Tensor:
        """The ids of a document, int64 [tokens].

        Raises:
            DocumentError: it cannot be read.
        """
        try:
            text = self.documents.text(number)
            return text_tokens(text, self.text_model.tokenizer, True, self.request.split_special_tokens)
        except (ValueError, OSError) as error:
            raise DocumentError(str(error)) from error


@torch.no_grad()
def read_side_by_side(
    model: TTTE2EForCausalLM, start: TTTE2ECache, ids: dict[int, torch.Tensor], shown: bool = True
) -> Iterator[tuple[int, TTTE2ECache]]:
    """Read documents as rows of one batch; each leaves it where it ends, so that nothing is ever padded.

    Args:
        start: what each of them is read after, of one row or empty; stays as it is.
        ids: int64 [tokens] of each document, by its number.
        shown: whether there is a progress bar.

    Yields:
        Number and learned context of each, the shortest first.
    """
    order = sorted(ids, key=lambda number: len(ids[number]))
    cache, read = start.fork(), 0
    cache.batch_repeat_interleave(max(1, len(order)))
    total, bar = sum(map(len, ids.values())), {"unit": " tokens", "unit_scale": True, "leave": False, "delay": 5}
    with tqdm(total=total, disable=not shown, **bar) as progress:
        for place, number in enumerate(order):
            end = len(ids[number])
            if end > read:
                rows = torch.stack([ids[other][read:end] for other in order[place:]]).to(model.device)
                for piece in rows.split(STEP, dim=1):
                    model(piece, cache=cache, use_cache=True, logits_to_keep=1)
                    progress.update(piece.numel())
                read = end
            alone = cache.fork()
            alone.batch_select_indices(torch.tensor([0]))
            yield number, alone
            if place + 1 < len(order):
                cache.batch_select_indices(torch.arange(1, len(order) - place))


def _check_outside(output: Path, documents: str) -> None:
    """Check that contexts are not written among the documents, where the next run would take them for some."""
    folder = Path(documents).expanduser()
    if folder.is_dir() and Path(output).expanduser().resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output={str(output)!r} lies in documents={documents!r}: choose a folder outside of it")


def _open_record(request: ReadingRequest, model: TTTE2EForCausalLM) -> None:
    """Write what decides the contexts into their folder, or check that what stands there is the same."""
    path = Path(request.documents).expanduser()
    context = None if request.context is None else file_digest(Path(request.context) / COUNTERS)
    record = {
        "documents": str(path.resolve()) if path.exists() else request.documents,
        "text_column": request.text_column,
        "split": request.split,
        "split_special_tokens": request.split_special_tokens,
        "context": context,
        "model": fingerprint(model),
    }
    with claimed(request.output, PATIENCE):
        if (request.output / RECORD).exists():
            check_record(request.output, record)
        else:
            check_output(request.output, resume=False)
            write_record(request.output, record, {"model": request.model})
