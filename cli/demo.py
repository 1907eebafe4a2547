"""`ttt-e2e demo`: the whole way, from text files to a saved context, at a size that fits a laptop."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import refuse


def demo(
    folder: Annotated[Path, typer.Option(help="Where to write.", file_okay=False)] = Path("runs/demo"),
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe instead of the built-in one.", exists=True, dir_okay=False)
    ] = None,
    processes: options.Processes = None,
) -> None:
    """Train a tiny TTT-E2E and its baselines on Python's own source files and compare them (minutes, on a CPU).

    Three steps: training and comparing, as `ttt-e2e reproduce demo` does; saving, loading and generating; reading a
    long file once and continuing from the saved learned context. Interrupted, the same command goes on.

    Written to the folder: `report.md`, `0-loss-by-position/` with a picture, `results.json`, `model/` (load it with
    `AutoModelForCausalLM.from_pretrained`), `learned_context/`, and in `models/` and `cache/` all trainings and tokens.
    """
    from rich.console import Console

    from ttt_e2e.configuration import load_demo_recipe

    from .demo_steps import run_demo

    try:
        chosen = load_demo_recipe(recipe) if recipe else load_demo_recipe()
        run_demo(chosen, folder, Console(), processes)
    except (ValueError, OSError) as error:
        refuse(error)
