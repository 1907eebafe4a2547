"""The commands that read, write and keep contexts, run on a small model."""

import inspect
import re

import typer
from typer.testing import CliRunner

from ttt_e2e.cli.chat import chat
from ttt_e2e.cli.contexts import generate, read
from ttt_e2e.cli.serve import serve

from ..serving.small import BOOK, save_text_model

PROMPT = " and then the miller"
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(serve).parameters.items()}
app = typer.Typer(pretty_exceptions_enable=False)
for command in (read, generate, chat, serve):
    app.command()(command)


def fill_place(place, text_model):
    """A folder gets a model, documents, and the learned context of the first of them."""
    save_text_model(text_model, place / "model")
    (place / "book.txt").write_text(BOOK)
    (place / "sequel.txt").write_text(BOOK[::-1])
    done = run(place, "read", "--document", place / "book.txt", "--output", place / "book")
    assert done.exit_code == 0, done.output
    return place


def run(place, command, *options, typed=None, model="model"):
    """Run a command; its messages come as one line, without the frame around them."""
    arguments = [command, "--model", str(place / model), *map(str, options)]
    environment = {"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, arguments, input=typed, env=environment)


def refused(done, *named):
    """Whether a command was refused with a message that names things."""
    message = re.sub(r"[\s│]+", " ", done.output)
    assert done.exit_code == 2, message
    assert all(str(name) in message for name in named), message
    return True


def written(place, *options):
    done = run(place, "generate", "--temperature", 0, "--max-new-tokens", 12, *options)
    assert done.exit_code == 0, done.output
    return done.stdout


def talk(place, *lines, options=()):
    """The answers, and everything else that is shown, line by line."""
    options = ("--temperature", 0, "--max-new-tokens", 6, *options)
    done = run(place, "chat", *options, typed="".join(f"{line}\n" for line in lines))
    assert done.exit_code == 0, done.output
    return done.stdout.split("> ")[1:]
