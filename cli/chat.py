"""`ttt-e2e chat`: talk with a model that keeps learning over the turns."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .contexts import say_loading
from .errors import refusals

if TYPE_CHECKING:
    from ttt_e2e.serving import Conversation

HELP = """\
/read FILE    read a text and learn from it; the talk goes on behind it
/save FOLDER  keep what was learned; `ttt-e2e chat --context FOLDER` goes on from it
/reset        forget the conversation
/help         this list
/exit         leave (as does the end of the input, Ctrl-D)
Ctrl-C        ends an answer; pressed twice, the whole turn is forgotten"""


def chat(
    model: options.Model,
    context: Annotated[
        Path | None, typer.Option(help="A learned context to begin with; it stays as it is.", file_okay=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 512,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.95,
    seed: options.Seed = None,
    learn_from: options.LearnFrom = "context",
    split_special_tokens: options.SplitSpecialTokens = True,
    dtype: options.ContextDtype = "auto",
    device: options.Device = None,
) -> None:
    """Talk with a model. It learns from all turns; each one costs its own tokens only, however long the talk is.

    Try it: `ttt-e2e chat --model runs/tiny --context book.context`

    The turns have the form of the tokenizer's chat template; where it has none, they are paragraphs of text that begin
    with "User:" and "Assistant:". In the chat, `/help` lists what else can be typed.
    """
    say_loading(model)
    from transformers import set_seed

    from ttt_e2e.serving import Conversation, load_text_model, open_context, writing_arguments

    with refusals():
        arguments = writing_arguments(temperature, top_p, learn_from)
        text_model = load_text_model(model, dtype=dtype, device=device, split_special_tokens=split_special_tokens)
        start = None if context is None else open_context(context, text_model.model)
        conversation = Conversation(text_model, start, max_new_tokens=max_new_tokens, **arguments)
    if seed is not None:
        set_seed(seed)
    read_before = f"{start.tokens:,} tokens read before" if start is not None else "nothing read before"
    typer.echo(f"{model}: {read_before}. /help lists the commands.")
    while (line := next_line()) is not None:
        if line.startswith("/"):
            if line == "/exit":
                break
            typer.echo(obey(line, conversation))
        elif line:
            say(line, conversation)


def next_line() -> str | None:
    """What is typed next, without spaces around it; None at the end of the input."""
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            typer.echo()
            return None
        except KeyboardInterrupt:
            typer.echo("\n/exit leaves.")


def obey(line: str, conversation: "Conversation") -> str:
    """Run a command; returns what to show."""
    command, _, argument = line.partition(" ")
    if command == "/help":
        return HELP
    if command == "/reset":
        conversation.reset()
        return "The conversation is forgotten."
    if command == "/read":
        if not argument.strip():
            return "/read needs a file, as in /read book.txt"
        return read_file(argument.strip(), conversation)
    if command == "/save":
        if not argument.strip():
            return "/save needs a folder, as in /save talk.context"
        folder = Path(argument.strip()).expanduser()
        try:
            conversation.save(folder)
        except (ValueError, OSError) as error:
            return f"Not saved: {error}"
        return f"{folder}: {conversation.context.tokens:,} tokens. `--context {folder}` goes on from it."
    return f"{command} is no command.\n{HELP}"


def read_file(name: str, conversation: "Conversation") -> str:
    """Read a file into the conversation; returns what to show: how the loss fell, and what is kept."""
    from ttt_e2e.serving import document_name, document_text

    path, before = Path(name).expanduser(), conversation.context.tokens
    try:
        losses = conversation.read(document_name(path), document_text(path))
    except (ValueError, OSError) as error:
        return f"Not read: {error}"
    except KeyboardInterrupt:
        return "\nInterrupted; the text is forgotten."
    count = conversation.context.tokens - before
    parts = [losses[len(losses) * quarter // 4 : len(losses) * (quarter + 1) // 4] for quarter in range(4)]
    means = ", ".join(f"{sum(part) / len(part):.3f}" for part in parts if part)
    fell = f" Loss by quarters: {means} nats per token." if len(losses) >= 4 else ""
    kept = f"{conversation.context.cache.nbytes / 2**20:.1f} MiB are kept of all that was read"
    return f"{path}: {count:,} tokens.{fell} {kept}, however much that is."


def say(message: str, conversation: "Conversation") -> None:
    """Show the answer to a message as it is written."""
    from transformers import TextStreamer

    streamer = TextStreamer(conversation.text_model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with interruptible() as interrupted:
            conversation.answer(message, streamer, interrupted)
    except KeyboardInterrupt:
        typer.echo("\nThe turn is forgotten.")
    except (ValueError, RuntimeError) as error:
        typer.echo(f"\nNo answer: {error}", err=True)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C makes the function that is given true; pressed again, it interrupts."""
    pressed = False

    def press(number, frame) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
