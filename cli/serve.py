"""`ttt-e2e serve`: a server with OpenAI's API, whose requests can go on from learned contexts."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .contexts import say_loading
from .errors import refusals

MEBIBYTE = 2**20
EVERYWHERE = ("", "0.0.0.0", "::")  # hosts that stand for all addresses of this machine


def serve(
    model: options.Model,
    contexts: Annotated[
        Path | None,
        typer.Option(help="Folder with learned contexts (of `ttt-e2e read`), which requests name.", file_okay=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model. [default: its folder's name]")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    largest_request: Annotated[int, typer.Option(metavar="MIB", help="Longer requests are refused.", min=1)] = 4,
    default_max_tokens: Annotated[
        int | None,
        typer.Option(help="Written where a request names no number. [default: 256, or --max-tokens if less]", min=1),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Requests for longer texts are refused.", min=1)] = 4096,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which clients may call the server, besides localhost and --host; give it once for each.",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Prompts that are read or answered at once; further ones wait. [default: as many as half of the free "
            "memory holds, at most 32]",
            min=1,
        ),
    ] = None,
    prefix_memory: Annotated[
        int,
        typer.Option(
            metavar="MIB",
            help="For what earlier requests have read, so that one which begins alike need not read it again; 0: none.",
            min=0,
        ),
    ] = 256,
    contexts_in_memory: Annotated[int, typer.Option(help="The last used ones stay loaded.", min=1)] = 4,
    split_special_tokens: options.SplitSpecialTokens = True,
    dtype: options.ContextDtype = "auto",
    device: options.Device = None,
) -> None:
    """Serve a model to OpenAI's clients: `/v1/completions`, `/v1/chat/completions` and `/v1/models`.

    Try it: `ttt-e2e serve --model runs/tiny --contexts contexts`

    A request goes on from the learned context `book` (the folder contexts/book) when it names the model
    `tiny:book`, or with the field `context`: `client.completions.create(model="tiny", prompt="...",
    extra_body={"context": "book"})`. The field `learn_from` is that of `generate`. Requests never change a context.
    Many are answered at once, as rows of one batch; `/metrics` shows in Prometheus's form how busy the server is.

    There is no password: do not open the port to a network that you do not trust.
    With `--host 0.0.0.0` clients may call the server by any IP address, and by the names of `--allow-host`. Symbolic
    links in the folder of contexts are not followed.
    """
    say_loading(model)
    try:
        uvicorn = import_module("uvicorn")
        server_module = import_module("ttt_e2e.serving.server")
        doors = import_module("ttt_e2e.serving.doors")
    except ImportError as error:
        raise typer.BadParameter(
            f"The server needs further packages ({error}); install them: pip install 'ttt-e2e[serve]'"
        ) from error
    from ttt_e2e.loading import model_label
    from ttt_e2e.serving import ContextFolder, load_text_model

    with refusals():
        limits = server_module.TokenLimits(default_max_tokens, max_tokens)
        capacity = server_module.Capacity(rows, prefix_memory * MEBIBYTE)
        with doors.bound_socket(host, port) as listening:
            text_model = load_text_model(model, dtype=dtype, device=device, split_special_tokens=split_special_tokens)
            named = ContextFolder(contexts, text_model.model, kept=contexts_in_memory)
            name = name or model_label(Path(model).resolve() if Path(model).is_dir() else model)
            app = server_module.build_app(
                name,
                text_model,
                named,
                largest_request * MEBIBYTE,
                limits=limits,
                capacity=capacity,
                allowed_hosts=[host, *(allow_host or [])],
                any_address=host in EVERYWHERE,
            )
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            typer.echo(f"{name} with {len(named.names())} learned contexts at http://{shown}:{port}/v1 (Ctrl-C ends)")
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
