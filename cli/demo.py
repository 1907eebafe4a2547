"""`ttt-e2e demo`: the whole way, from text files to a saved context, at a size that fits a laptop."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import refuse


def demo(
    folder: Annotated[Path, typer.Option(help="Where to write.", file_okay=False)] = Path("runs/demo"),
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe instead of the built-in one.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Train a tiny TTT-E2E and two baselines on Python's own source files and compare them (minutes, on a CPU).

    Five steps: tokenizer and data; training as `ttt-e2e train` does; loss by token position up to 4 times the training
    length; saving, loading and generating; reading a long file once and continuing from the saved learned context.

    Written to the folder: `results.json`, `results.md`, `loss_by_position.png`, `model/` (load it with
    `AutoModelForCausalLM.from_pretrained`), `learned_context/`, and in `cache/` the tokenizer and the tokens.
    """
    from rich.console import Console

    from ttt_e2e.configuration import load_demo_recipe

    from .demo_steps import run_demo

    try:
        chosen = load_demo_recipe(recipe) if recipe else load_demo_recipe()
        run_demo(chosen, folder, Console())
    except (ValueError, OSError) as error:
        refuse(error)
