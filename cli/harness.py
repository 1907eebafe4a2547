"""`ttt-e2e lm-eval`: the community's evaluation harness, with the models and task files of this package."""

import sys
from importlib import import_module, resources
from pathlib import Path

import typer

HELP = {"-h", "--help"}
# Everything, `--help` too, belongs to the harness.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def lm_eval(context: typer.Context) -> None:
    """Run lm_eval's own command line, here with TTT-E2E models and the tasks local_text and local_text_by_position.

    Every argument is passed on. Where `--tasks` are given without `--include_path` or `--config`, the folder of our
    task files is added.
    """
    if not HELP & set(context.args):
        import ttt_e2e  # noqa: F401  the Auto classes of transformers learn our models

    try:
        harness = import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "lm_eval":
            raise
        raise typer.BadParameter("The package lm_eval is missing; install it: pip install lm_eval") from error
    before = sys.argv
    sys.argv = ["lm-eval", *with_task_folder(context.args)]
    try:
        harness.cli_evaluate()
    finally:
        sys.argv = before


def with_task_folder(arguments: list[str]) -> list[str]:
    """The arguments, with `--include_path` of our task files where tasks are named and nothing else is said."""
    given = {argument.partition("=")[0] for argument in arguments}
    if given & {"--tasks", "-t"} and not given & {"--include_path", "--config", "-C"}:
        return [*arguments, "--include_path", str(task_folder())]
    return list(arguments)


def task_folder() -> Path:
    """Where the package's task files for the harness lie."""
    return Path(str(resources.files("ttt_e2e.evaluation") / "harness"))
