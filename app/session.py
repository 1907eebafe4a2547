"""What one visitor does: documents read in pieces, questions asked, a context saved, loaded and compared.

Nothing here knows of browsers. One thing happens at a time in a session; with the models, one thing at a time in all.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from .. import TTTE2ECache
from ..serving import (
    Conversation,
    ReadDocument,
    StoredContext,
    TextModel,
    text_tokens,
    write,
    writing_arguments,
)
from .archive import pack_context, unpack_context
from .comparison import Comparison, compare_contexts
from .loss_curve import LossCurve
from .model_queue import ModelQueue
from .text_stream import stream_text

PIECE_TOKENS = 256  # read in one turn, so that a curve grows steadily and nobody waits long
NO_TARGET = -100
BUSY = "The model is still reading or writing here: pause it, or wait for its end"
NOTHING_LEARNED = (0, 0)  # the positions that are learned from: none


@dataclass(frozen=True)
class Limits:
    """What a visitor may give at once, in characters, and have written, in tokens."""

    document: int = 16 * 2**20
    message: int = 20_000
    new_tokens: int = 1024


@dataclass(frozen=True)
class Progress:
    """Where a session stands.

    Attributes:
        name: of the document that is being read or was read last; empty before the first one.
        read, length: tokens of it that have been read, and all of them.
        tokens: in the learned context.
        learning, plain: losses of the documents with learning on, and of the same texts with no inner step since then.
        speed: tokens a second with learning, None before the first piece; plain_speed: without.
        kept: bytes of the learned context; full: bytes of the keys and values that full attention would keep instead.
    """

    name: str
    read: int
    length: int
    tokens: int
    learning: LossCurve
    plain: LossCurve
    speed: float | None
    plain_speed: float | None
    kept: int
    full: int

    @property
    def is_reading(self) -> bool:
        """Whether a document has not been read to its end."""
        return self.read < self.length


@dataclass
class _Document:
    """A document that is being read: ids int64 [tokens], the position reached, its entry in the context."""

    name: str = ""
    ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    position: int = 0
    entry: ReadDocument | None = None
    seconds: float = 0.0
    plain_seconds: float = 0.0


class Session:
    """A learned context that grows with what a visitor lets the model read and write.

    Args:
        text_model: shared by all sessions.
        queue: of all sessions, for turns with the models.
        limits: what is refused.

    Attributes:
        context: what has been read and written so far.
        is_closed: the visitor has left; nothing more is read or written.
        last_used: when something was last begun or ended, by `time.monotonic`.
    """

    def __init__(self, text_model: TextModel, queue: ModelQueue, limits: Limits | None = None):
        self.text_model, self.queue, self.limits = text_model, queue, limits or Limits()
        self.is_closed, self.last_used = False, time.monotonic()
        self._work, self._stop = threading.Lock(), threading.Event()
        self._begin_with(StoredContext.new(text_model.model))

    def _begin_with(self, context: StoredContext) -> None:
        self.context = context
        self._plain, self._unread = context.cache.fork(), []  # the same text without inner steps, and what it lacks
        self._document = _Document()
        width = self.text_model.model.config.mini_batch_size
        self._curves = LossCurve(context.tokens, width), LossCurve(context.tokens, width)

    @contextmanager
    def _working(self) -> Iterator[None]:
        if not self._work.acquire(blocking=False):
            raise ValueError(BUSY)
        try:
            self._stop.clear()
            self.last_used = time.monotonic()
            if self.is_closed:
                raise ValueError("This session has ended: load the page again")
            yield
        finally:
            self.last_used = time.monotonic()
            self._work.release()

    @property
    def is_working(self) -> bool:
        """Whether something is being read or written, or has been begun and waits for its turn."""
        return self._work.locked()

    def check_idle(self) -> None:
        """Check that something new can begin.

        Raises:
            ValueError: something is being read or written.
        """
        if self.is_working:
            raise ValueError(BUSY)

    def _stopped(self) -> bool:
        return self._stop.is_set() or self.is_closed

    def progress(self) -> Progress:
        """Where the session stands now."""
        document, (learning, plain) = self._document, self._curves
        config, dtype = self.text_model.model.config, self.text_model.model.dtype
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return Progress(
            name=document.name,
            read=document.position,
            length=len(document.ids),
            tokens=self.context.tokens,
            learning=learning,
            plain=plain,
            speed=document.position / document.seconds if document.seconds else None,
            plain_speed=document.position / document.plain_seconds if document.plain_seconds else None,
            kept=self.context.cache.nbytes,
            full=per_token * self.context.tokens,
        )

    def add_document(self, name: str, text: str) -> None:
        """Lay a document ready; `read_on` reads it, into the same context.

        Raises:
            ValueError: it is empty or too long, or another one is not read to its end.
        """
        if self.progress().is_reading:
            raise ValueError(
                f"{self._document.name} is not read to its end: let the model go on, or forget everything first"
            )
        if not text.strip():
            raise ValueError("There is nothing to read: paste a text, drop a file, or take one that is there")
        if len(text) > self.limits.document:
            raise ValueError(
                f"The document has {len(text):,} characters, but {self.limits.document:,} are read here at most: "
                "give a part of it"
            )
        with self._working():
            model = self.text_model
            self._document = _Document(name, text_tokens(text, model.tokenizer, True, model.split_special_tokens))

    def read_on(self) -> Generator[Progress, None, None]:
        """Read the document piece by piece, to its end or until `stop`; what was read is in the context at any time."""
        with self._working():
            while self.progress().is_reading and not self._stopped():
                with self.queue.turn():
                    if not self._stopped():
                        self._read_piece()
                yield self.progress()

    def stop(self) -> None:
        """Pause reading after the piece at hand, or end what is being written."""
        self._stop.set()

    def _read_piece(self) -> None:
        """Read a piece with learning and without; after an exception nothing has been read."""
        document = self._document
        end = min(document.position + PIECE_TOKENS, len(document.ids))
        ids = document.ids[document.position : end]
        # The last token predicts the first one of the next piece; nothing is behind the last one of all.
        targets = torch.full_like(ids, NO_TARGET)
        following = document.ids[document.position + 1 : end + 1]
        targets[: len(following)] = following
        context, plain = self.context.fork(), self._plain.fork()
        started = time.perf_counter()
        losses = self._read_ids(context.cache, ids, targets, None)
        between = time.perf_counter()
        plain_losses = self._read_plain(plain, ids, targets)
        ended = time.perf_counter()

        entry = ReadDocument(document.name, len(ids))
        documents = context.documents
        if document.entry is not None and documents and documents[-1] is document.entry:
            entry = replace(entry, tokens=len(ids) + document.entry.tokens)
            documents = documents[:-1]
        self.context = replace(context, documents=(*documents, entry), answer_end=None)
        self._plain, self._unread = plain, []
        for curve, found in zip(self._curves, (losses, plain_losses), strict=True):
            curve.add(found)
        document.position, document.entry = end, entry
        document.seconds += between - started
        document.plain_seconds += ended - between

    def _read_plain(self, cache: TTTE2ECache, ids: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
        """As `_read_ids` without learning, after what was written since the last document."""
        for piece in torch.tensor(self._unread, dtype=torch.long).split(PIECE_TOKENS) if self._unread else ():
            self._read_ids(cache, piece, torch.full_like(piece, NO_TARGET), NOTHING_LEARNED)
        return self._read_ids(cache, ids, targets, NOTHING_LEARNED)

    @torch.no_grad()
    def _read_ids(
        self, cache: TTTE2ECache, ids: torch.Tensor, targets: torch.Tensor, span: tuple[int, int] | None
    ) -> np.ndarray:
        """Read ids into a cache; returns the losses of their targets, float64 [tokens], NaN where there is none."""
        model = self.text_model.model
        rows, labels = ids[None].to(model.device), targets[None].to(model.device)
        output = model(rows, shift_labels=labels, cache=cache, use_cache=True, skip_logits=True, learning_span=span)
        losses = output.token_nll[0].double().cpu().numpy()
        losses[targets.numpy() == NO_TARGET] = np.nan
        return losses

    def ask(self, message: str, learn: bool, **arguments) -> Generator[str, None, None]:
        """Answer a message, as the next turn of a conversation; gives the answer so far again and again.

        Args:
            learn: from the message and the answer; else the fast weights stay as they are.
            arguments: of `_arguments`.

        Raises:
            ValueError: the message is empty or too long; an argument is out of range.
        """
        self._check_message(message)
        arguments = self._arguments(learn, **arguments)

        def work(streamer) -> str:
            conversation = Conversation(self.text_model, self.context, **arguments)
            answer = conversation.answer(message, streamer, self._stopped)
            self._take_over(conversation.context, [*answer.read, *answer.written])
            return answer.text

        return self._stream(work)

    def go_on_writing(self, text: str, learn: bool, **arguments) -> Generator[str, None, None]:
        """Write on from a text, right behind what was read; gives what is written so far again and again.

        Args, raises: as `ask`.
        """
        self._check_message(text)
        model, arguments = self.text_model, self._arguments(learn, **arguments)

        def work(streamer) -> str:
            after = self.context.fork()
            ids = text_tokens(text, model.tokenizer, after.tokens == 0, model.split_special_tokens).tolist()
            written = write(model.model, ids, after.cache, streamer=streamer, stop=self._stopped, **arguments)
            document = ReadDocument("prompt and what was written", len(ids) + len(written))
            context = replace(after, documents=(*after.documents, document), answer_end=None)
            self._take_over(context, [*ids, *written])
            return str(model.tokenizer.decode(written, skip_special_tokens=True))

        return self._stream(work)

    def _take_over(self, context: StoredContext, ids: list[int]) -> None:
        """Go on from a context after ids of no document; they have their place in the curves, and no loss."""
        self.context = context
        self._unread += ids
        for curve in self._curves:
            curve.add(np.full(len(ids), np.nan))

    def _check_message(self, message: str) -> None:
        if not message.strip():
            raise ValueError("There is nothing to answer or to write on from: type something")
        if len(message) > self.limits.message:
            raise ValueError(
                f"The message has {len(message):,} characters, but {self.limits.message:,} are taken here at most: "
                "let the model read it as a document"
            )

    def _arguments(self, learn: bool, max_new_tokens: int = 256, temperature: float = 0.7, top_p: float = 0.95) -> dict:
        if not 1 <= max_new_tokens <= self.limits.new_tokens:
            raise ValueError(f"Tokens to write: {max_new_tokens}; choose from 1 to {self.limits.new_tokens}")
        writing = writing_arguments(temperature, top_p, "context" if learn else "none")
        return {"max_new_tokens": int(max_new_tokens), **writing}

    def _stream(self, work: Callable) -> Generator[str, None, None]:
        with self._working():
            yield from stream_text(work, self.text_model.tokenizer, self.queue, self.stop)

    def save(self, path: Path) -> None:
        """Write the learned context as one file.

        Raises:
            ValueError: nothing has been read.
            OSError: it cannot be written.
        """
        with self._working(), self.queue.turn():
            pack_context(self.context, path)

    def load(self, path: Path) -> None:
        """Go on from a file that `save` wrote, in place of what was read here.

        Raises:
            ValueError: it is no such file, damaged, or of another model. What was read here stays.
        """
        with self._working(), self.queue.turn():
            self._begin_with(unpack_context(path, self.text_model.model))

    def compare(self, path: Path, passage: str = "") -> tuple[StoredContext, Comparison]:
        """The context in a file, and how it differs from the one here.

        Args:
            passage: a text whose loss is measured after both, if there is one.

        Raises:
            ValueError: as `load`.
        """
        model = self.text_model
        if len(passage) > self.limits.message:
            raise ValueError(
                f"The passage has {len(passage):,} characters, but {self.limits.message:,} are taken here at most: "
                "give a part of it"
            )
        with self._working(), self.queue.turn():
            other, ids = unpack_context(path, model.model), None
            if passage.strip():
                ids = text_tokens(passage, model.tokenizer, True, model.split_special_tokens)
            return other, compare_contexts(model, self.context, other, ids)

    def forget(self) -> None:
        """Forget all that was read and written.

        Raises:
            ValueError: something is being read or written.
        """
        with self._working():
            self._begin_with(StoredContext.new(self.text_model.model))

    def close(self) -> None:
        """End the session: what is being read or written ends after the piece at hand."""
        self.is_closed = True
        self.stop()
