"""`ttt-e2e reproduce`: experiments of the paper, at the size of a laptop."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import refusals


def reproduce(
    experiment: Annotated[
        str | None, typer.Argument(help="An experiment, or a YAML file of yours. Without it: a list of all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write. [default: runs/EXPERIMENT]", file_okay=False)
    ] = None,
    models: Annotated[
        Path, typer.Option(help="Where trained models are kept; experiments share them.", file_okay=False)
    ] = Path("runs/models"),
    rows: options.Rows = None,
    seeds: Annotated[int | None, typer.Option(help="At most so many trainings of a row.", min=1)] = None,
    processes: options.Processes = None,
    cache: options.Cache = options.DEFAULT_CACHE,
) -> None:
    """Train the systems of an experiment, measure them, and compare with what the paper found.

    Interrupted, the same command goes on: finished models and points are kept. A disagreement with the paper is shown
    as one. The experiments named -full have the sizes of the paper.

    Written to the folder: one folder per measurement with its tables and pictures, and `report.md`.
    """
    from rich.console import Console

    from ttt_e2e.configuration.experiments import experiment_description, experiment_names, load_experiment

    from .reproduce_steps import run_experiment

    if experiment is None:
        for name in experiment_names():
            typer.echo(f"{name:28}{experiment_description(name)}")
        return
    with refusals():
        chosen = load_experiment(experiment).part(rows or (), seeds)
    run_experiment(chosen, output or Path("runs") / chosen.name, models, cache, Console(), processes)
