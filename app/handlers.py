"""What happens at each event of the page: a session works, and the parts that show it are given anew.

A handler gives dictionaries of parts and their new values, one after the other. What goes wrong is a sentence on the
page.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from transformers.utils import logging

from ..serving import document_text
from .chart import draw_curves
from .model_queue import ModelQueue
from .model_shelf import ModelShelf
from .session import Limits, Progress, Session
from .sessions import Sessions
from .wording import comparison_table, numbers, sentence, where_it_stands

if TYPE_CHECKING:
    from .page import Parts

logger = logging.get_logger(__name__)

ASK, CONTINUE = "Ask", "Write on"
PASTED = "pasted text"
FILE_NAME = "learned-context.zip"
# Seconds between two pictures of the curve: more would be work for the browser alone.
PACE = 0.4
BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8

Shown = dict[Any, Any]


def told(handler: Callable[..., Iterator[Shown]]) -> Callable[..., Iterator[Shown]]:
    """Errors of a handler as sentences on the page, in their own words where they are meant for its visitor."""

    @functools.wraps(handler)
    def telling(self: "Handlers", *arguments, **keywords) -> Iterator[Shown]:
        try:
            yield from handler(self, *arguments, **keywords)
        except (ValueError, OSError) as error:
            yield {self.parts.said: sentence(str(error), is_error=True)}
        except Exception as error:
            logger.exception("A handler of the page failed")
            said = f"The page failed ({type(error).__name__}); its log says more. What was read before is still there."
            yield {self.parts.said: sentence(said, is_error=True)}

    return telling


class Handlers:
    """The handlers of one page.

    Args:
        shelf: its models; queue: for turns with them; sessions: of its visitors; limits: what is refused.
        parts: of the page.
    """

    def __init__(self, shelf: ModelShelf, queue: ModelQueue, sessions: Sessions, limits: Limits, parts: "Parts"):
        self.shelf, self.queue, self.sessions, self.limits, self.parts = shelf, queue, sessions, limits, parts

    def _session(self, model: str, request: gr.Request) -> Session:
        text_model = self.shelf.get(model)
        return self.sessions.of(str(request.session_hash), lambda: Session(text_model, self.queue, self.limits))

    def _picture(self, progress: Progress, paused: bool = True) -> Shown:
        return {
            self.parts.said: where_it_stands(progress, paused),
            self.parts.curves: draw_curves(progress),
            self.parts.numbers: numbers(progress),
        }

    def _buttons(self, session: Session, busy: bool) -> Shown:
        parts, is_reading = self.parts, session.progress().is_reading
        return {
            parts.read: gr.update(interactive=not busy),
            parts.pause: gr.update(interactive=busy),
            parts.stop: gr.update(interactive=busy),
            parts.go_on: gr.update(interactive=is_reading and not busy),
            parts.send: gr.update(interactive=not busy),
        }

    def _working(self, session: Session, steps: Iterator[Shown]) -> Iterator[Shown]:
        """Steps of a session's work, with the buttons as they are meanwhile and afterwards, after an error as well."""
        session.check_idle()
        yield self._buttons(session, busy=True)
        try:
            yield from steps
        except Exception:
            yield self._buttons(session, session.is_working)
            raise
        if not session.is_closed:
            yield {**self._buttons(session, session.is_working), **self._picture(session.progress())}

    @told
    def read(self, model: str, text: str, file: str | None, request: gr.Request) -> Iterator[Shown]:
        """Read what was pasted or dropped, in place of nothing or behind what was read before."""
        if file and text.strip():
            raise ValueError("There are a text and a file: take one of them away, then read the other")
        name = Path(file).name if file else PASTED
        if file:
            size = Path(file).stat().st_size
            if size > BYTES_OF_A_CHARACTER * self.limits.document:
                raise ValueError(f"{name} has {size:,} bytes, too many to be read here: give a part of it")
            try:
                text = document_text(Path(file))
            except ValueError as error:
                raise ValueError(str(error).replace(repr(str(file)), repr(name))) from error
        session = self._session(model, request)
        yield {self.parts.said: sentence(f"{name}: finding its tokens ...")}
        session.add_document(name, text)
        yield {self.parts.text: "", self.parts.file: None}
        yield from self._read_on(session)

    def reader_of(self, name: str, text: str) -> Callable[..., Iterator[Shown]]:
        """The handler that reads a text that is there."""

        def read_it(model: str, request: gr.Request) -> Iterator[Shown]:
            yield from self._read_there(name, text, model, request)

        return read_it

    @told
    def _read_there(self, name: str, text: str, model: str, request: gr.Request) -> Iterator[Shown]:
        session = self._session(model, request)
        session.add_document(name, text)
        yield from self._read_on(session)

    @told
    def go_on(self, model: str, request: gr.Request) -> Iterator[Shown]:
        """Go on with the document that was paused."""
        yield from self._read_on(self._session(model, request))

    def _read_on(self, session: Session) -> Iterator[Shown]:
        return self._working(session, self._reading(session))

    def _reading(self, session: Session) -> Iterator[Shown]:
        yield self._picture(session.progress(), paused=False)
        shown = 0.0
        with closing(session.read_on()) as reading:
            for progress in reading:
                if time.monotonic() - shown > PACE:
                    shown = time.monotonic()
                    yield self._picture(progress, paused=False)

    def stop(self, request: gr.Request) -> None:
        """Pause reading, or end what is being written."""
        session = self.sessions.find(str(request.session_hash))
        if session is not None:
            session.stop()

    @told
    def forget(self, model: str, request: gr.Request) -> Iterator[Shown]:
        """Begin anew."""
        session = self._session(model, request)
        session.forget()
        yield {**self._nothing_read(session), self.parts.said: sentence("All is forgotten.")}

    @told
    def choose(self, model: str, request: gr.Request) -> Iterator[Shown]:
        """Take another model, for which what was read before means nothing."""
        yield {self.parts.said: sentence(f"Loading {model} ...")}
        text_model = self.shelf.get(model)
        session = Session(text_model, self.queue, self.limits)
        self.sessions.replace(str(request.session_hash), session)
        said = f"{model} is here. It has read nothing: learned contexts belong to the model that has read."
        yield {**self._nothing_read(session), self.parts.said: sentence(said)}

    def _nothing_read(self, session: Session) -> Shown:
        picture = self._picture(session.progress())
        more = {self.parts.chat: [], self.parts.comparison: "", self.parts.saved: gr.update(visible=False)}
        return {**picture, **self._buttons(session, busy=False), **more}

    @told
    def write(
        self, model: str, message: str, mode: str, learn: bool, length: int, chat: list, request: gr.Request
    ) -> Iterator[Shown]:
        """Answer a message or write on from it; the text appears as it is written."""
        session = self._session(model, request)
        begin = session.ask if mode == ASK else session.go_on_writing
        texts = begin(message, learn, max_new_tokens=int(length))
        yield from self._working(session, self._writing(texts, message, chat))

    def _writing(self, texts: Generator[str, None, None], message: str, chat: list) -> Iterator[Shown]:
        turns = [*chat, {"role": "user", "content": message}]
        yield {self.parts.said: sentence("Writing ..."), self.parts.chat: turns, self.parts.message: ""}
        with closing(texts):
            for text in texts:
                yield {self.parts.chat: [*turns, {"role": "assistant", "content": text}]}

    @told
    def save(self, model: str, request: gr.Request) -> Iterator[Shown]:
        """Make a file of the learned context."""
        session = self._session(model, request)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE_NAME
            session.save(path)
            size, tokens = path.stat().st_size / 2**20, session.progress().tokens
            # Gradio copies the file when it is given.
            yield {
                self.parts.saved: gr.update(value=str(path), label=f"Download {path.name}", visible=True),
                self.parts.said: sentence(f"What was learned from {tokens:,} tokens is a file of {size:.1f} MiB."),
            }

    @told
    def load(self, model: str, stored: str | None, request: gr.Request) -> Iterator[Shown]:
        """Go on from a saved file, in place of what was read here."""
        session, path = self._session(model, request), _given(stored)
        session.load(path)
        said = f"{path.name}: {session.progress().tokens:,} tokens were read. Read another document, or ask."
        yield {**self._nothing_read(session), self.parts.said: sentence(said), self.parts.stored: None}

    @told
    def compare(self, model: str, stored: str | None, passage: str, request: gr.Request) -> Iterator[Shown]:
        """Hold what was learned here against a saved file."""
        session, path = self._session(model, request), _given(stored)
        other, found = session.compare(path, passage)
        table = comparison_table(session.context, path.name, other, found)
        yield {self.parts.comparison: table, self.parts.said: sentence("Compared, below.")}

    def leave(self, request: gr.Request) -> None:
        """Drop what a visitor has read."""
        self.sessions.drop(str(request.session_hash))


def _given(stored: str | None) -> Path:
    if not stored:
        raise ValueError("There is no file: drop one that was saved here")
    return Path(stored)
