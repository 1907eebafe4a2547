"""How a command ends when something is wrong."""

from typing import NoReturn

import typer


def refuse(error: Exception) -> NoReturn:
    """Stop with what is wrong, notes included; quietly where the command's output is cut off, as by `| head`."""
    if isinstance(error, BrokenPipeError) and output_is_cut():
        raise error  # typer ends the process without a word
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    raise typer.BadParameter(f"{error}{notes}") from error


def output_is_cut() -> bool:
    """Whether nobody reads what this process writes; another broken pipe is a fault like others."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False
