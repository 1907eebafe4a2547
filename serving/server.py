"""The server of transformers (`transformers serve`, compatible with OpenAI's API) for one model and its contexts.

Routes, tokenizing, decoding, streaming and the forms of the answers are transformers'. Ours is: one model that is
loaded beforehand, a learned context of its own for every request, checks with proper HTTP errors, and nothing else that
can be reached from outside. Requests are worked on one after the other, each with fast weights of its own, so that none
changes what another one gets.
"""

import asyncio
import copy
import dataclasses
import json
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState, InferenceThread

from ..training.tokenizer import PLAIN_END, PLAIN_TEMPLATE, speaks_plainly
from .contexts import ContextFolder, StoredContext
from .models import TextModel
from .requests import ChatFields, CompletionFields, Fields, check_request
from .writing import StopWhen

# Set when the client of the request at hand has gone away.
GONE: ContextVar[threading.Event] = ContextVar("gone")
PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/load_model"}
SEPARATOR = ":"
NO_MODEL = "model={!r}: there is no such model; there are {}"
TOO_LONG = (
    "the request is longer than {} bytes; read long texts beforehand (ttt-e2e read) and name their learned context"
)


class OneModel(ModelManager):
    """The model that is served, under its name; no other one is ever loaded.

    Args:
        name: what clients call it; contexts are listed as `name:context`.
    """

    def __init__(self, name: str, text_model: TextModel, contexts: ContextFolder):
        super().__init__(model_timeout=-1)
        self.name, self.text_model, self.contexts = name, text_model, contexts
        self.force_model = name

    def process_model_name(self, model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args, **kwargs):
        return self.text_model.model, self.text_model.tokenizer

    def ids(self) -> list[str]:
        """What clients may name as the model."""
        return [self.name, *(f"{self.name}{SEPARATOR}{context}" for context in self.contexts.names())]

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        entry = {"object": "model", "created": 0, "owned_by": "ttt-e2e", "status": {"value": "loaded"}}
        return [{"id": name, **entry} for name in self.ids()]

    async def load_model_streaming(self, model_id_and_revision: str, gguf_file: str | None = None):
        """What `transformers chat` asks first: whether the model is there. Nothing is loaded."""
        event = {"status": "ready", "model": model_id_and_revision, "cached": True}
        if model_id_and_revision not in self.ids():
            event = {"status": "error", "message": NO_MODEL.format(model_id_and_revision, ", ".join(self.ids()))}
        yield f"data: {json.dumps(event)}\n\n"

    def find_context(self, request: Fields) -> str | None:
        """The context that a request names: in the field `context`, or behind the model's name.

        Raises:
            HTTPException: 404 for an unknown model or context, 400 for two different ones.
        """
        wanted, context = request.model, request.context
        if wanted is not None and wanted != self.name:
            name, _, behind = wanted.partition(self.name + SEPARATOR)
            if name or not behind:
                raise HTTPException(404, NO_MODEL.format(wanted, ", ".join(self.ids())))
            if context not in (None, behind):
                raise HTTPException(400, f"model={wanted!r} and context={context!r}: name one context")
            context = behind
        names = self.contexts.names()
        if context is not None and context not in names:
            known = f"there are {', '.join(names)}" if names else "there are none"
            raise HTTPException(404, f"context={context!r}: there is no such learned context; {known}")
        return context


class RequestGeneration(GenerateManager):
    """The generation of one request, on the thread of all of them.

    Args:
        start: the context to go on from, for this request alone; None begins anew.
    """

    def __init__(self, thread: InferenceThread, request: Fields, start: StoredContext | None, is_plain_chat: bool):
        self._thread, self.gone = thread, GONE.get()
        self.request, self.start, self.is_plain_chat = request, start, is_plain_chat

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        inputs = self._prepare(inputs, gen_config, processor)
        return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        inputs = self._prepare(inputs, gen_config, processor)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)

    def submit(self, fn: Callable, *args, **kwargs):
        return super().submit(self._with_seed(fn), *args, **kwargs)

    def async_submit(self, fn: Callable, *args, **kwargs):
        return super().async_submit(self._with_seed(self._unless_gone(fn)), *args, **kwargs)

    def _unless_gone(self, fn: Callable) -> Callable:
        """Nothing is read for a client that went away while it waited (a stream is ended by its streamer)."""

        def run(*args, **kwargs):
            if self.gone.is_set():
                raise HTTPException(499, "the client has gone away")
            return fn(*args, **kwargs)

        return run

    def _with_seed(self, fn: Callable) -> Callable:
        """The seed is set where and when the tokens are drawn: other requests draw in between otherwise."""
        seed = self.request.seed

        def run(*args, **kwargs):
            if seed is None:
                return fn(*args, **kwargs)
            torch.manual_seed(seed)
            try:
                return fn(*args, **kwargs)
            finally:
                torch.seed()  # those who come next and name no seed get chance again

        return run

    def _prepare(self, inputs, gen_config, tokenizer) -> dict:
        """Arguments of `generate`; `inputs` gets the ids that are read."""
        request = self.request
        if request.temperature or (request.top_p is not None and request.temperature is None):
            gen_config.do_sample = True
        if request.logit_bias is not None:  # which transformers leaves out of completions
            gen_config.sequence_bias = {(int(token),): bias for token, bias in request.logit_bias.items()} or None
        if self.is_plain_chat and request.stop is None:
            gen_config.stop_strings = PLAIN_END
        # From here on only the thread holds the context, so that its memory is free when it stops.
        start, self.start = self.start, None
        ids = inputs["input_ids"]
        read = 0 if start is None else start.cache.get_seq_length()
        if read and ids[0, :1].tolist() == [tokenizer.bos_token_id]:  # the text began with the context
            ids = ids[:, 1:]
        if ids.shape[1] == 0:
            raise HTTPException(400, "the prompt is empty: give at least one token to go on from")
        inputs["input_ids"] = ids  # the handler counts them
        arguments = {
            "input_ids": ids,
            "attention_mask": ids.new_ones(1, read + ids.shape[1]),
            "stopping_criteria": StoppingCriteriaList([StopWhen(self.gone.is_set)]),
        }
        if read:
            arguments["cache"] = start.cache
        if request.learn_from is not None:
            arguments["learn_from"] = request.learn_from
        return arguments


class RequestState(GenerationState):
    """Gives a handler of transformers the generation of one request."""

    def __init__(self, generation: RequestGeneration):
        super().__init__()
        self.generation = generation

    def get_manager(self, model_id: str, use_cb: bool = False) -> RequestGeneration:
        return self.generation


@dataclass(frozen=True)
class Endpoint:
    """A route: checks a request, opens its context, and hands it to a handler of transformers.

    Attributes:
        handler: makes the answer.
        fields: what the request may say.
    """

    manager: OneModel
    thread: InferenceThread
    handler: type[BaseHandler]
    fields: type[Fields]

    async def handle_request(self, body: dict, request_id: str) -> JSONResponse | StreamingResponse:
        request = check_request(body, self.fields)
        name = self.manager.find_context(request)
        chat_template = self.manager.text_model.tokenizer.chat_template
        if body.get("tools") and "tools" not in str(chat_template):
            raise HTTPException(400, "tools: the model's chat template has no place for them; leave the field out")
        start = None if name is None else await asyncio.to_thread(self._open, name)
        is_plain_chat = self.fields is ChatFields and speaks_plainly(self.manager.text_model.tokenizer)
        generation = RequestGeneration(self.thread, request, start, is_plain_chat)
        template = {"sanitize_control_tokens": self.manager.text_model.split_special_tokens}
        if is_plain_chat:
            template["chat_template"] = PLAIN_TEMPLATE
        handler = self.handler(self.manager, RequestState(generation), template)
        left_out = {"context", "learn_from", "seed"}
        body = {field: value for field, value in body.items() if field not in left_out} | {"model": self.manager.name}
        try:
            return await handler.handle_request(body, request_id)
        except (TemplateError, ValueError) as error:  # what only the chat template or `generate` finds out
            raise HTTPException(400, f"the request cannot be answered: {error}") from error

    def _open(self, name: str) -> StoredContext:
        try:
            return self.manager.contexts.open(name)
        except (OSError, KeyError, ValueError) as error:
            raise HTTPException(422, f"context={name!r} cannot be used: {error}") from error


class Doorkeeper:
    """Refuses requests whose body is too long, throwing it away as it comes in; notices clients that go away.

    Args:
        limit: bytes.
    """

    def __init__(self, app: Callable, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages, total, more = [], 0, True
        while more:
            message = await receive()
            total += len(message.get("body", b""))
            more = message.get("more_body", False)
            messages = [*messages, message] if total <= self.limit else []

        async def again() -> dict:
            return messages.pop(0) if messages else await receive()

        gone = threading.Event()
        GONE.set(gone)
        watch = asyncio.create_task(self._watch(receive, gone))
        app = self.app if total <= self.limit else error_answer(413, TOO_LONG.format(self.limit))
        try:
            await app(scope, again, send)
        finally:
            watch.cancel()

    async def _watch(self, receive: Callable, gone: threading.Event) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()


def error_answer(status: int, message: str) -> JSONResponse:
    """An error in the form that OpenAI's clients show."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


async def explain(request: Request, error: HTTPException | RequestValidationError) -> JSONResponse:
    """The answer to a request that was refused."""
    if isinstance(error, RequestValidationError):
        return error_answer(422, "; ".join(f"{one['loc'][0]}: {one['msg']}" for one in error.errors()))
    return error_answer(error.status_code, str(error.detail))


def build_app(name: str, text_model: TextModel, contexts: ContextFolder, largest_request: int = 2**22) -> FastAPI:
    """The application, for uvicorn or any other ASGI server.

    Args:
        name: what clients call the model.
        contexts: named learned contexts that requests may go on from.
        largest_request: bytes.

    Raises:
        ValueError: the tokenizer cannot stream.
    """
    if not text_model.tokenizer.is_fast:
        raise ValueError("The tokenizer has no tokenizer.json, which streaming needs; save a fast one with the model")
    manager, thread = OneModel(name, text_model, contexts), InferenceThread()
    # A tokenizer of its own: set on that of chats, it would split the special tokens of their template as well.
    text_tokenizer = copy.deepcopy(text_model.tokenizer)
    text_tokenizer.split_special_tokens = text_model.split_special_tokens
    text_manager = OneModel(name, dataclasses.replace(text_model, tokenizer=text_tokenizer), contexts)
    app = build_server(
        model_manager=manager,
        chat_handler=Endpoint(manager, thread, ChatCompletionHandler, ChatFields),
        completion_handler=Endpoint(text_manager, thread, CompletionHandler, CompletionFields),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=GenerationState(),
    )
    # The others unload the model, or do what it cannot.
    app.router.routes[:] = [route for route in app.router.routes if route.path in PATHS]
    app.add_exception_handler(StarletteHTTPException, explain)
    app.add_exception_handler(RequestValidationError, explain)
    app.add_middleware(Doorkeeper, limit=largest_request)
    return app
