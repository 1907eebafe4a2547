"""How a command ends when something is wrong."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


def refuse(error: Exception) -> NoReturn:
    """Stop with what is wrong, notes included; quietly where the command's output is cut off, as by `| head`.

    Of several processes the first one explains, and the others say a line.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        typer.echo(f"process {rank}: {error}", err=True)
        raise typer.Exit(2)
    if isinstance(error, BrokenPipeError) and output_is_cut():
        raise error  # typer ends the process without a word
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    raise typer.BadParameter(f"{error}{notes}") from error


@contextmanager
def refusals(interrupted: str | None = None) -> Iterator[None]:
    """Stop with what is wrong within the block; with a sentence of one's own where it is interrupted."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        refuse(error)
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        typer.echo(interrupted, err=True)
        raise typer.Exit(130) from None


def output_is_cut() -> bool:
    """Whether nobody reads what this process writes; another broken pipe is a fault like others."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False
