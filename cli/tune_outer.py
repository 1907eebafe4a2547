"""`ttt-e2e tune-outer`: the learning rates that suit each system of an experiment."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import refusals


def tune_outer(
    experiment: Annotated[str, typer.Argument(help="An experiment of ttt-e2e reproduce, or a YAML file of yours.")],
    factors: Annotated[
        str, typer.Option(help="Of the recipe's learning rates, which are all multiplied by each.")
    ] = "0.5,1,2",
    recipe: Annotated[
        str | None, typer.Option(help="Of the experiment's recipes, whose rates. [default: its first]")
    ] = None,
    rows: options.Rows = None,
    share: Annotated[float, typer.Option(help="Of the recipe's steps.", min=0.01, max=1)] = 0.25,
    output: Annotated[
        Path | None, typer.Option(help="Where to write. [default: runs/EXPERIMENT-tuning]", file_okay=False)
    ] = None,
    models: Annotated[Path, typer.Option(help="Where trained models are kept.", file_okay=False)] = Path("runs/models"),
    cache: options.Cache = options.DEFAULT_CACHE,
) -> None:
    """Train every system of an experiment at several learning rates, and tell which suits it best.

    The same effort for each: as many rates, as many tokens, and up to two rates beyond the grid where the best stands
    at its edge. They are compared on documents that are kept back for it from the training ones, never on those of the
    experiment. A further recipe (--recipe) goes on from what those before it train, for the same share of their steps.

    Interrupted, the same command goes on: finished trainings are kept. Written to the folder: `tuning.json` and
    `tuning.md`, with the lines for the experiment's file.
    """
    from rich.console import Console

    from ttt_e2e.configuration.experiments import load_experiment

    from .tune_outer_steps import tune_outer as tune

    with refusals():
        chosen = load_experiment(experiment).part(rows or ())
        grid = options.parse_numbers(factors, "--factors", float)
        if not grid or min(grid) <= 0:
            raise ValueError(f"--factors {factors}: must be above 0, as in --factors 0.5,1,2")
        if not chosen.recipes:
            raise ValueError(f"experiment={experiment!r} trains nothing: choose one with a recipe")
        recipe = recipe or chosen.recipes[0]
        known = dict.fromkeys(each for row in chosen.rows.values() for each in chosen.system_recipes(row.system))
        if recipe not in known:
            raise ValueError(f"--recipe {recipe}: experiment {chosen.name!r} has {', '.join(known)}")
    tune(chosen, recipe, grid, share, output or Path("runs") / f"{chosen.name}-tuning", models, cache, Console())
