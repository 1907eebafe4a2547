"""Entry point of the `ttt-e2e` command."""

from importlib.metadata import version

import typer

from .bench import bench
from .chat import chat
from .contexts import generate, read
from .convert import convert
from .demo import demo
from .export import export
from .harness import PASS_THROUGH, lm_eval
from .measure import measure
from .merge import merge
from .page import page
from .presets import presets
from .reproduce import reproduce
from .serve import serve
from .train import train
from .tune_outer import tune_outer
from .warm_start import transformer, tune_inner_lr

app = typer.Typer(
    name="ttt-e2e",
    help="Language models that keep learning while they read (End-to-End Test-Time Training).",
    epilog="Start with: ttt-e2e demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
convert.command()(transformer)
app.command()(demo)
app.command()(train)
app.command("evaluate")(measure)
app.command()(reproduce)
app.command()(generate)
app.command()(read)
app.command()(chat)
app.command()(serve)
app.command("app")(page)
app.add_typer(convert, name="convert")
app.command("tune-inner-lr")(tune_inner_lr)
app.command("tune-outer")(tune_outer)
app.command()(export)
app.command()(merge)
app.command()(presets)
app.command("lm-eval", context_settings=PASS_THROUGH)(lm_eval)
app.command()(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ttt-e2e {version('ttt-e2e')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Options that stand before the sub-command."""


if __name__ == "__main__":
    app()
