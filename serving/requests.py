"""What a request to the server may say, checked before any work."""

import json
from typing import Annotated, Any

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig

from ..generation_ttt_e2e import LEARN_FROM

# Fields that ask for something else than one plain answer, and the values with which they do not.
NOT_POSSIBLE = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "previous_response_id": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "web_search_options": (),
}
Tokens = Annotated[int, Field(ge=1, lt=2**31)]


class Fields(BaseModel):
    """Fields of all kinds of requests. Those that are not listed here are left to transformers."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    context: str | None = None
    learn_from: str | None = None
    stream: bool | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    generation_config: str | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d+$")], float] | None = None


class CompletionFields(Fields):
    """A text to be continued."""

    prompt: Annotated[str, Field(min_length=1)]
    suffix: str | None = None


class TextPart(BaseModel):
    """A part of a message."""

    type: str
    text: str


class CalledFunction(BaseModel):
    """What a message says about a tool that the model has called: arguments by their names, or a JSON text of them."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(BaseModel):
    """A call of a tool."""

    function: CalledFunction


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] = []


class ChatFields(Fields):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = {}


def check_request(body: dict[str, Any], fields: type[Fields]) -> Fields:
    """The fields of a request.

    Raises:
        HTTPException: 400, naming the field, its value and what is wrong with it.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can spell out half a character
        raise HTTPException(400, f"the request is not Unicode ({error}); repair its text") from error
    try:
        found = fields.model_validate(body)
    except ValidationError as error:
        raise HTTPException(400, "; ".join(_complaint(one) for one in error.errors())) from error
    if found.learn_from is not None and found.learn_from not in LEARN_FROM:
        raise HTTPException(400, f"learn_from={found.learn_from!r}: must be one of {', '.join(LEARN_FROM)}")
    for name, allowed in NOT_POSSIBLE.items():
        value = body.get(name)
        if value is not None and value not in allowed:
            raise HTTPException(400, f"{name}={value!r}: this server cannot do that; leave the field out")
    if found.generation_config is not None:
        try:
            GenerationConfig(**json.loads(found.generation_config)).validate(strict=True)
        except (ValueError, TypeError) as error:
            raise HTTPException(400, f"generation_config={found.generation_config[:80]!r}: {error}") from error
    return found


def _complaint(error: dict) -> str:
    name = ".".join(str(part) for part in error["loc"])
    shown = "" if error["type"] == "missing" else f"={str(error['input'])[:80]!r}"
    return f"{name}{shown}: {error['msg']}"
