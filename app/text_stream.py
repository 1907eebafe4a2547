"""Text that appears while a model writes it."""

import threading
from collections.abc import Callable, Generator
from queue import Empty

from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from .model_queue import ModelQueue

PATIENCE = 0.5  # seconds between two looks at whether the writing thread has ended


class QueuedStreamer(TextIteratorStreamer):
    """Gives others their turn with the models after every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, queue: ModelQueue):
        super().__init__(tokenizer, skip_prompt=True, timeout=PATIENCE, skip_special_tokens=True)
        self.queue = queue

    def put(self, value) -> None:
        super().put(value)
        self.queue.let_others_go_first()


def stream_text(
    work: Callable[[TextIteratorStreamer], str],
    tokenizer: PreTrainedTokenizerBase,
    queue: ModelQueue,
    stop: Callable[[], None],
) -> Generator[str, None, None]:
    """Let work write in a thread of its own; gives the text so far whenever there is more, and its result in the end.

    Args:
        work: writes into the streamer that it gets; returns the whole text.
        queue: one turn of it is taken, and passed on after every token.
        stop: asks the work to end; called where nobody takes the text any more.

    Raises:
        Exception: what the work raises.
    """
    streamer = QueuedStreamer(tokenizer, queue)
    result: list[str] = []
    failed: list[BaseException] = []

    def write() -> None:
        try:
            with queue.turn():
                result.append(work(streamer))
        except BaseException as error:  # raised again where the text is taken
            failed.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    text = ""
    try:
        while thread.is_alive():
            try:
                text += next(streamer)
                yield text
            except Empty:
                continue
            except StopIteration:
                break
    except GeneratorExit:
        stop()
        raise
    finally:
        thread.join()
    if failed:
        raise failed[0]
    yield result[0]
