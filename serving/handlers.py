"""The handlers of transformers' server, for requests that were checked and go on from a learned context."""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    BaseHandler,
    DirectStreamer,
    GenerationState,
    Modality,
    _GenerationCancelled,
    _StreamError,
)

from ..data.tokenizer import PLAIN_END, PLAIN_TEMPLATE, encode_texts, speaks_plainly
from ..generation_ttt_e2e import LEARN_FROM
from .contexts import StoredContext
from .doors import GONE
from .requests import ChatFields, CompletionFields, Fields, TemplateFields, check_request, generation_fields
from .sampling import Sampling
from .scheduler import Job, Scheduler
from .served_model import OneModel


class TextThread:
    """Fills in templates and tokenizes, while other clients are answered; in turn, as tokenizers need it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text")

    async def do(self, work: Callable, *arguments):
        """The result of `work(*arguments)`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


@dataclass(frozen=True)
class TokenLimits:
    """How much is written for one prompt.

    Attributes:
        default: where the request does not say. None: 256, or the most if that is less.
        most: longer ones are refused.

    Raises:
        ValueError: the default is above the most.
    """

    default: int | None = None
    most: int = 4096

    def __post_init__(self):
        if self.default is None:
            object.__setattr__(self, "default", min(256, self.most))
        if self.default > self.most:
            raise ValueError(f"--default-max-tokens {self.default}: must be at most --max-tokens, which is {self.most}")

    def wanted(self, request: Fields) -> int:
        """The longest text that a request asks for.

        Raises:
            HTTPException: 400 where it is too long.
        """
        config = None if request.generation_config is None else generation_fields(request.generation_config)
        fields = {
            "max_completion_tokens": request.max_completion_tokens,
            "max_tokens": request.max_tokens,
            "generation_config.max_new_tokens": None if config is None else config.max_new_tokens,
        }
        name, value = next(((name, n) for name, n in fields.items() if n is not None), ("max_tokens", self.default))
        if value > self.most:
            raise HTTPException(
                400, f"{name}={value}: this server writes at most {self.most} tokens for a request (its --max-tokens)"
            )
        return value


class RequestGeneration(BaseGenerateManager):
    """The generation of one prompt, beside all others. It ends where the client goes away.

    Args:
        start: the context to go on from, for this prompt alone; None begins anew.
    """

    def __init__(self, scheduler: Scheduler, request: Fields, start: StoredContext | None):
        self.scheduler, self.request, self.start, self.gone = scheduler, request, start, GONE.get()

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        streamer = DirectStreamer(processor._tokenizer, loop, queue, response_parser=response_parser)

        def end(error: BaseException | None) -> None:
            if error is None:
                streamer.end()
            else:
                shown = None if isinstance(error, CancelledError) else _StreamError(str(error))
                loop.call_soon_threadsafe(queue.put_nowait, shown)

        def put(token: int) -> None:
            try:
                streamer.put(torch.tensor([token]))
            except _GenerationCancelled as error:
                raise CancelledError from error

        ids = self._prompt(inputs, processor)
        streamer.put(ids[0])  # it expects the prompt first
        self._submit(ids, model, processor, gen_config, put, end)
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        loop, written, ids = asyncio.get_running_loop(), [], self._prompt(inputs, processor)
        ended = loop.create_future()

        def end(error: BaseException | None) -> None:
            loop.call_soon_threadsafe(note_end, error)

        def note_end(error: BaseException | None) -> None:
            if not ended.done():  # as it is where nobody waits any more
                ended.set_result(error)

        self._submit(ids, model, processor, gen_config, written.append, end)
        error = await ended
        if isinstance(error, CancelledError):
            raise HTTPException(499, "the client has gone away")
        if error is not None:
            raise error
        return processor.decode(written, skip_special_tokens=True), ids.shape[1], written

    def stop(self) -> None:
        """Nothing of its own is running."""

    def _submit(self, ids, model, tokenizer, config, put, end) -> None:
        # From here on only the job holds the context, so that its memory is free when it ends.
        start, self.start = self.start, None
        self.scheduler.submit(
            Job(
                ids=ids,
                start=None if start is None else start.cache,
                learn_from=self.request.learn_from or LEARN_FROM[0],
                sampling=lambda: Sampling(model, ids, config, tokenizer, self.request.seed),
                put=put,
                end=end,
                gone=self.gone.is_set,
            )
        )

    def _prompt(self, inputs, tokenizer) -> torch.Tensor:
        """The ids that are read; `inputs` gets them."""
        ids = inputs["input_ids"]
        if self.start is not None and self.start.tokens and ids[0, :1].tolist() == [tokenizer.bos_token_id]:
            ids = ids[:, 1:]  # the text began with the context
        if ids.shape[1] == 0:
            raise HTTPException(400, "the prompt is empty: give at least one token to go on from")
        inputs["input_ids"] = ids  # the handler counts them
        return ids


class CheckedHandler(BaseHandler):
    """Checks a request, opens its context, prepares its prompts beside the event loop, and answers them."""

    fields: type[Fields]
    # Fields of ours, which transformers' schema does not know.
    own_fields = frozenset({"context", "learn_from", "seed"})

    def __init__(self, manager: OneModel, scheduler: Scheduler, texts: TextThread, limits: TokenLimits):
        super().__init__(manager, GenerationState())
        self.scheduler, self.texts, self.limits = scheduler, texts, limits

    async def handle_request(self, body: dict, request_id: str) -> JSONResponse | StreamingResponse:
        model = self.model_manager.text_model.model
        request = check_request(body, self.fields, model.config.vocab_size)
        name = self.model_manager.find_context(request)
        body = {field: value for field, value in body.items() if field not in self.own_fields}
        self._validate_request(body)
        config = self.generation_config(request, body)
        self.check(request)
        start = None if name is None else await asyncio.to_thread(self.model_manager.open_context, name)
        prompts = await self.texts.do(self.prompts, request, body)
        generations = [RequestGeneration(self.scheduler, request, start and start.fork()) for _ in prompts]
        pairs = zip(prompts, generations, strict=True)
        try:
            answers = await asyncio.gather(
                *(self.answer(request, body, inputs, config, own, request_id) for inputs, own in pairs)
            )
            return answers[0] if len(answers) == 1 else together(answers)
        except ValueError as error:  # what only `generate` finds out
            raise HTTPException(400, f"the request cannot be answered: {error}") from error

    def check(self, request: Fields) -> None:
        """What depends on the model and the kind of request.

        Raises:
            HTTPException: 400.
        """

    def prompts(self, request: Fields, body: dict) -> list[dict[str, torch.Tensor]]:
        """Each prompt as `input_ids` [1, tokens]."""
        raise NotImplementedError

    def extras(self, body: dict) -> dict[str, Any]:
        """What the handler of transformers wants to know besides."""
        raise NotImplementedError

    def generation_config(self, request: Fields, body: dict) -> GenerationConfig:
        """How to write."""
        body = dict(body)
        if request.generation_config is not None:
            given = generation_fields(request.generation_config)
            body["generation_config"] = given.model_dump_json(exclude_none=True)
        config = self._build_generation_config(body, self.model_manager.text_model.model.generation_config)
        config.max_new_tokens = self.limits.wanted(request)
        if request.temperature or (request.top_p is not None and request.temperature is None):
            config.do_sample = True
        # transformers leaves it out of completions.
        config.sequence_bias = {(int(token),): bias for token, bias in (request.logit_bias or {}).items()} or None
        return config

    async def answer(self, request, body, inputs, config, generation, request_id) -> JSONResponse | StreamingResponse:
        """The answer to one prompt."""
        manager = self.model_manager
        model, tokenizer = manager.text_model.model, manager.text_model.tokenizer
        arguments = (request_id, model, tokenizer, manager.name, inputs, config, generation)
        if request.stream:
            return self._streaming(*arguments, **self.extras(body))
        return await self._non_streaming(*arguments, **self.extras(body))


class Chat(CheckedHandler, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    fields = ChatFields

    def __init__(self, manager: OneModel, scheduler: Scheduler, texts: TextThread, limits: TokenLimits):
        super().__init__(manager, scheduler, texts, limits)
        self.is_plain = speaks_plainly(manager.text_model.tokenizer)

    def check(self, request: ChatFields) -> None:
        if request.tools and "tools" not in str(self.model_manager.text_model.tokenizer.chat_template):
            raise HTTPException(400, "tools: the model's chat template has no place for them; leave the field out")

    def prompts(self, request: ChatFields, body: dict) -> list[dict[str, torch.Tensor]]:
        text_model = self.model_manager.text_model
        template = (request.chat_template_kwargs or TemplateFields()).model_dump(exclude_none=True)
        try:
            inputs = text_model.tokenizer.apply_chat_template(
                self.get_processor_inputs_from_messages(body["messages"], Modality.LLM),
                chat_template=PLAIN_TEMPLATE if self.is_plain else None,
                tools=body.get("tools"),
                sanitize_control_tokens=text_model.split_special_tokens,
                return_tensors="pt",
                return_dict=True,
                **template,
            )
        except Exception as error:  # whatever the template raises, it is this conversation that it cannot show
            raise HTTPException(400, f"messages: the model's chat template cannot show them: {error}") from error
        return [{"input_ids": inputs["input_ids"].to(text_model.model.device)}]

    def extras(self, body: dict) -> dict[str, Any]:
        return {"tools": body.get("tools")}

    def generation_config(self, request: ChatFields, body: dict) -> GenerationConfig:
        config = super().generation_config(request, body)
        if self.is_plain and config.stop_strings is None:
            config.stop_strings = PLAIN_END
        return config


class Completion(CheckedHandler, CompletionHandler):
    """`/v1/completions`."""

    fields = CompletionFields

    def check(self, request: CompletionFields) -> None:
        if request.stream and len(request.prompts) > 1:
            raise HTTPException(400, "stream=True: only with one prompt; send the prompts one by one, or do not stream")

    def prompts(self, request: CompletionFields, body: dict) -> list[dict[str, torch.Tensor]]:
        text_model = self.model_manager.text_model
        texts_or_ids = request.prompts
        if isinstance(texts_or_ids[0], str):
            # A client that wants a special token gives ids.
            split = text_model.split_special_tokens
            texts_or_ids = encode_texts(texts_or_ids, text_model.tokenizer, split, add_special_tokens=True)
        ids = [torch.tensor([one], dtype=torch.long, device=text_model.model.device) for one in texts_or_ids]
        return [{"input_ids": one} for one in ids]

    def extras(self, body: dict) -> dict[str, Any]:
        return {"suffix": body.get("suffix")}


def together(answers: Sequence[Response]) -> JSONResponse:
    """The answers to several prompts as one, in their order."""
    bodies = [json.loads(bytes(answer.body)) for answer in answers]
    choices = [{**body["choices"][0], "index": index} for index, body in enumerate(bodies)]
    usage = {name: sum(body["usage"][name] for body in bodies) for name in bodies[0]["usage"]}
    return JSONResponse({**bodies[0], "choices": choices, "usage": usage})
