"""A conversation with a model that keeps learning over the turns, without a terminal."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

# What `apply_chat_template(..., sanitize_control_tokens=True)` does, which has no place for a part of a conversation.
from transformers.utils.chat_template_utils import (
    _get_control_token_patterns,
    encode_marked_chat,
    mark_control_tokens,
)

from ..data.tokenizer import PLAIN_END, PLAIN_TEMPLATE, speaks_plainly
from .contexts import ReadDocument, StoredContext, write_context
from .documents import read_document, text_tokens
from .models import TextModel
from .writing import write

CONVERSATION = "conversation"
QUESTION, ANSWER = "<question of no conversation>", "<answer of no conversation>"
# Longer than what any template puts behind an answer and the model may have written itself.
END_CHARACTERS = 64


@dataclass(frozen=True)
class Answer:
    """One turn.

    Attributes:
        text: the answer, without special tokens.
        read: the ids of the turn that stand before the answer.
        written: the ids of the answer, an end token included.
    """

    text: str
    read: tuple[int, ...]
    written: tuple[int, ...]


class Turns:
    """The ids around the messages, by the tokenizer's chat template or, where it has none, as plain text.

    A turn depends on its message and on how the answer before it ended, on nothing else.

    Args:
        split_special_tokens: a message that spells out a special token, such as `<|end|>`, means these letters, and
            only the template writes special tokens; False reads it as that token.

    Attributes:
        is_plain: the turns are plain text, because the tokenizer has no chat template of its own.

    Raises:
        ValueError: the template cannot say what stands between an answer and the next message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool = True):
        self.tokenizer, self.split_special_tokens = tokenizer, split_special_tokens
        self.is_plain = speaks_plainly(tokenizer)
        self.template = PLAIN_TEMPLATE if self.is_plain else None
        self.first(QUESTION, begin=True), self.following(QUESTION, "")

    def first(self, message: str, begin: bool) -> list[int]:
        """The first turn; `begin`: nothing was read before it."""
        text = self._render([{"role": "user", "content": message}])
        if not begin and self.tokenizer.bos_token is not None:
            text = text.removeprefix(self.tokenizer.bos_token)
        return self._ids(text)

    def following(self, message: str, answer_end: str) -> list[int]:
        """A later turn: the end of the answer before it, as far as the model has not written it, and the message."""
        roles = (("user", QUESTION), ("assistant", ANSWER), ("user", message))
        text = self._render([{"role": role, "content": content} for role, content in roles])
        _, found, text = text.partition(ANSWER)
        if not found:
            raise ValueError("The tokenizer's chat template leaves answers out; give the tokenizer another one")
        lengths = range(min(len(text), len(answer_end)), 0, -1)
        written = next((length for length in lengths if answer_end.endswith(text[:length])), 0)
        return self._ids(text[written:])

    def _render(self, messages: list[dict]) -> str:
        """The text of messages, in which special tokens that stand in a message are marked."""
        try:
            if self.split_special_tokens:
                template = self.tokenizer.get_chat_template(self.template)
                pattern, _ = _get_control_token_patterns(self.tokenizer._get_control_tokens(template))
                messages = mark_control_tokens(messages, pattern)
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, add_generation_prompt=True, tokenize=False
            )
            return str(text)
        except (TemplateError, ValueError, TypeError) as error:
            raise ValueError(
                f"The tokenizer's chat template cannot be used ({error}); give the tokenizer another one"
            ) from error

    def _ids(self, text: str) -> list[int]:
        if self.split_special_tokens:
            return encode_marked_chat(self.tokenizer, text)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class Conversation:
    """Messages and answers, all of which the model reads and learns from. Only new tokens are read in a turn.

    Args:
        text_model: the model that answers.
        start: a context to begin with, or None; stays as it is. One that was saved by `save` goes on with its
            conversation.
        arguments: of `generate`, `max_new_tokens` among them.

    Attributes:
        context: what has been read so far.
    """

    def __init__(self, text_model: TextModel, start: StoredContext | None = None, **arguments):
        self.text_model = text_model
        self.turns = Turns(text_model.tokenizer, text_model.split_special_tokens)
        self.start = start if start is not None else StoredContext.new(text_model.model)
        self.context = self.start
        self.arguments = arguments
        if self.turns.is_plain:
            self.arguments |= {"stop_strings": PLAIN_END, "tokenizer": text_model.tokenizer}

    def answer(
        self, message: str, streamer: BaseStreamer | None = None, stop: Callable[[], bool] | None = None
    ) -> Answer:
        """Read a message and answer it. After an exception, the turn has not taken place.

        Args:
            message: not empty.
            streamer: gets the tokens as they are written.
            stop: asked after every token whether to end the answer there.

        Raises:
            ValueError: the message is empty.
        """
        if not message.strip():
            raise ValueError("message: is empty; say something")
        tokenizer, before = self.text_model.tokenizer, self.context
        if before.answer_end is None:
            read = self.turns.first(message, begin=before.tokens == 0)
        else:
            read = self.turns.following(message, before.answer_end)
        cache = before.cache.fork()
        written = write(self.text_model.model, read, cache, streamer=streamer, stop=stop, **self.arguments)
        self.context = replace(
            before,
            cache=cache,
            documents=_longer_conversation(before.documents, len(read) + len(written)),
            answer_end=str(tokenizer.decode(written))[-END_CHARACTERS:],
        )
        text = str(tokenizer.decode(written, skip_special_tokens=True))
        return Answer(text.removesuffix(PLAIN_END) if self.turns.is_plain else text, tuple(read), tuple(written))

    def read(self, name: str, text: str) -> list[float]:
        """Read a text between two turns; the next message follows it. After an exception, nothing has been read.

        Args:
            name: of the text, kept in the context.

        Returns:
            The losses of its mini-batches as `read_tokens` gives them.

        Raises:
            ValueError: the model does not learn while it reads.
        """
        model, before = self.text_model, self.context
        ids = text_tokens(text, model.tokenizer, before.tokens == 0, model.split_special_tokens)
        context, losses = read_document(model, before, name, ids)
        self.context = replace(context, answer_end=None)
        return losses

    def reset(self) -> None:
        """Forget all turns; what was read before the conversation stays."""
        self.context = self.start

    def save(self, folder: Path) -> None:
        """Write what has been read to a new folder; a conversation that starts with it goes on as this one would.

        Raises:
            ValueError: nothing has been read, or the folder holds something.
            OSError: it cannot be written.
        """
        write_context(folder, self.context)


def _longer_conversation(documents: tuple[ReadDocument, ...], tokens: int) -> tuple[ReadDocument, ...]:
    if documents and documents[-1].name == CONVERSATION:
        return (*documents[:-1], ReadDocument(CONVERSATION, documents[-1].tokens + tokens))
    return (*documents, ReadDocument(CONVERSATION, tokens))
