"""The server of transformers (`transformers serve`, compatible with OpenAI's API) for one model and its contexts.

Routes, decoding, streaming and the forms of the answers are transformers'. Ours is: one model that is loaded
beforehand, a learned context of its own for every request, checks with proper HTTP errors, and nothing else that can be
reached from outside. Requests share the model's steps (`scheduler`), each with fast weights of its own, so that none
changes what another one gets.
"""

from collections.abc import Collection

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from .contexts import ContextFolder
from .doors import Doorkeeper, HostCheck, excuse, explain
from .handlers import Chat, Completion, TextThread, TokenLimits
from .metrics import Metrics
from .models import TextModel
from .scheduler import Capacity, Scheduler
from .served_model import OneModel

# The others of transformers unload the model, or do what it cannot.
PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}


def build_app(
    name: str,
    text_model: TextModel,
    contexts: ContextFolder,
    largest_request: int = 2**22,
    limits: TokenLimits | None = None,
    capacity: Capacity | None = None,
    allowed_hosts: Collection[str] = (),
    any_address: bool = False,
) -> FastAPI:
    """The application, for uvicorn or any other ASGI server.

    Args:
        name: what clients call the model.
        contexts: named learned contexts that requests may go on from.
        largest_request: bytes.
        limits: how much is written for a prompt; by default those of `TokenLimits`.
        capacity: how much is held at once; by default that of `Capacity`.
        allowed_hosts: names by which clients may call the server, besides this machine's own (`localhost`).
        any_address: clients may call it by any IP address.

    Raises:
        ValueError: the tokenizer cannot stream.
    """
    if not text_model.tokenizer.is_fast:
        raise ValueError("The tokenizer has no tokenizer.json, which streaming needs; save a fast one with the model")
    manager, metrics = OneModel(name, text_model, contexts), Metrics()
    scheduler = Scheduler(text_model.model, capacity or Capacity(), metrics)
    scheduler.start()
    shared = (manager, scheduler, TextThread(), limits or TokenLimits())
    app = build_server(
        model_manager=manager,
        chat_handler=Chat(*shared),
        completion_handler=Completion(*shared),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=GenerationState(),
    )
    app.router.routes[:] = [route for route in app.router.routes if route.path in PATHS]

    @app.post("/load_model")
    async def load_model(body: dict) -> StreamingResponse:
        wanted = body.get("model")
        if not isinstance(wanted, str):
            raise HTTPException(400, f"model={str(wanted)[:80]!r}: must be the name of a model")
        return StreamingResponse(manager.load_model_streaming(wanted), media_type="text/event-stream")

    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    for kind in (StarletteHTTPException, RequestValidationError):
        app.add_exception_handler(kind, explain)  # type: ignore[arg-type]  # it is called with errors of this kind
    app.add_exception_handler(Exception, excuse)
    app.add_middleware(Doorkeeper, limit=largest_request)
    app.add_middleware(HostCheck, names=allowed_hosts, any_address=any_address)
    return app
