"""What a request to the server may say, checked before any work.

What a request may ask for is listed here, and how much of it: a client can neither choose how the server works (a chat
template of its own, another form of output) nor keep it busy by one request of many parts.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
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
MOST_STOP_STRINGS, LONGEST_STOP_STRING = 16, 128
MOST_MESSAGES, MOST_PARTS, MOST_TOOLS, MOST_PROMPTS, MOST_TOKENS_NAMED = 2048, 256, 128, 64, 1024
LEAST_TEMPERATURE = 1e-6  # logits divided by less overflow
DEEPEST = 64  # lists and objects within each other
COMPLAINTS = 5  # shown of one request

Tokens = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
NamedTokens = Annotated[list[TokenId], Field(max_length=MOST_TOKENS_NAMED)]
Text = Annotated[str, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP_STRING)]
StopStrings = StopString | Annotated[list[StopString], Field(max_length=MOST_STOP_STRINGS)]
Name = Annotated[str, Field(max_length=512)]
Share = Annotated[float, Field(gt=0, le=1)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MOST_TOKENS_NAMED),
]


def _temperature(value: float) -> float:
    if value != 0 and not LEAST_TEMPERATURE <= value <= 2:
        raise ValueError(f"must be 0 (always the likeliest token), or from {LEAST_TEMPERATURE} to 2")
    return value


Temperature = Annotated[float, AfterValidator(_temperature)]


class GenerationFields(BaseModel):
    """What `generation_config` may say. All else of transformers' changes the form of the output or how it is computed.

    Attributes:
        transformers_version: written by `GenerationConfig.to_json_string`; means nothing here.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    max_new_tokens: Tokens | None = None
    min_new_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    top_p: Share | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Share | None = None
    epsilon_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    eta_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1024)] | None = None
    renormalize_logits: bool | None = None
    stop_strings: StopStrings | None = None
    eos_token_id: TokenId | NamedTokens | None = None
    bos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_id: TokenId | NamedTokens | None = None
    suppress_tokens: NamedTokens | None = None
    begin_suppress_tokens: NamedTokens | None = None
    use_cache: Literal[True] | None = None
    transformers_version: str | None = None

    def token_ids(self) -> Iterator[tuple[str, int]]:
        """Every token that is named, with the field."""
        for field in type(self).model_fields:
            if field.endswith(("_token_id", "suppress_tokens")):
                value = getattr(self, field)
                for token in [] if value is None else value if isinstance(value, list) else [value]:
                    yield f"generation_config.{field}", token


class Fields(BaseModel):
    """Fields of all kinds of requests. Those that are not listed here are left to transformers."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: Name | None = None
    context: Name | None = None
    learn_from: Name | None = None
    stream: bool | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    frequency_penalty: Annotated[float, Field(ge=-0.99, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: StopStrings | None = None
    generation_config: str | None = None
    logit_bias: Biases | None = None

    def token_ids(self) -> Iterator[tuple[str, int]]:
        """Every token that is named, with the field."""
        for token in self.logit_bias or {}:
            yield "logit_bias", int(token)


class CompletionFields(Fields):
    """A text to be continued, or several; as text or as token ids."""

    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    suffix: str | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as a list."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[return-value]  # pydantic has checked its kind

    def token_ids(self) -> Iterator[tuple[str, int]]:
        yield from super().token_ids()
        for prompt in self.prompts:
            if not isinstance(prompt, str):
                yield from (("prompt", token) for token in prompt)


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
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

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_PARTS)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: str | None = None


class Document(BaseModel):
    """A text that chat templates for retrieval show to the model."""

    model_config = ConfigDict(extra="forbid")

    title: str | None = None
    text: str


class TemplateFields(BaseModel):
    """What `chat_template_kwargs` may say. The template itself, and what becomes of its text, is the server's."""

    model_config = ConfigDict(strict=True, extra="forbid")

    add_generation_prompt: bool = True
    enable_thinking: bool | None = None
    thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    documents: Annotated[list[Document], Field(max_length=MOST_PARTS)] | None = None


class ChatFields(Fields):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    tools: Annotated[list[dict[str, Any]], Field(max_length=MOST_TOOLS)] | None = None
    chat_template_kwargs: TemplateFields | None = None


KNOWN = {
    "chat_template_kwargs": TemplateFields.model_fields,
    "generation_config": GenerationFields.model_fields,
}


def check_request(body: dict[str, Any], fields: type[Fields], vocab_size: int) -> Fields:
    """The fields of a request.

    Args:
        vocab_size: token ids that the request names lie below it.

    Raises:
        HTTPException: 400, naming the field, its value and what is wrong with it.
    """
    _check_depth(body, "the request")
    _check_unicode(body)
    found = _validated(TypeAdapter(fields), body)
    if found.learn_from is not None and found.learn_from not in LEARN_FROM:
        raise HTTPException(400, f"learn_from={found.learn_from!r}: must be one of {', '.join(LEARN_FROM)}")
    for name, allowed in NOT_POSSIBLE.items():
        value = body.get(name)
        if value is not None and value not in allowed:
            raise HTTPException(400, f"{name}={_shown(value)}: this server cannot do that; leave the field out")
    named = list(found.token_ids())
    if found.generation_config is not None:
        named += generation_fields(found.generation_config).token_ids()
    for name, token in named:
        if token >= vocab_size:
            raise HTTPException(400, f"{name}: there is no token {token}; the model's have ids below {vocab_size}")
    return found


def generation_fields(text: str) -> GenerationFields:
    """What the field `generation_config` of a request says; what is null or false there says nothing.

    Raises:
        HTTPException: 400, naming what is wrong.
    """
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("must be a JSON object")
        _check_depth(given, "generation_config")
        _check_unicode(given)
        given = {
            name: value
            for name, value in given.items()
            if value is not None and (value is not False or name in ("do_sample", "use_cache"))
        }
        found = _validated(TypeAdapter(GenerationFields), given, "generation_config.")
        GenerationConfig(**found.model_dump(exclude_none=True)).validate(strict=True)
    except (ValueError, TypeError, RecursionError) as error:
        raise HTTPException(400, f"generation_config={_shown(text)}: {error}") from error
    return found


def _validated(adapter: TypeAdapter, value: Any, prefix: str = "") -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        complaints = [_complaint(one, prefix) for one in error.errors(include_url=False)[:COMPLAINTS]]
        raise HTTPException(400, "; ".join(complaints)) from error


def _check_depth(value: Any, name: str) -> None:
    """Templates and JSON go down by recursion."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise HTTPException(400, f"{name} nests lists and objects deeper than {DEEPEST} times; flatten it")


def _check_unicode(value: Any) -> None:
    """JSON can spell out half a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise HTTPException(400, f"the request is not Unicode ({error}); repair its text") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _complaint(error: Mapping[str, Any], prefix: str) -> str:
    name = prefix + ".".join(str(part)[:80] for part in error["loc"])
    shown = "" if error["type"] == "missing" else f"={_shown(error['input'])}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        allowed = KNOWN.get(name.split(".")[0])
        message = "not for clients to choose; leave it out" + (f" (they may: {', '.join(allowed)})" if allowed else "")
    return f"{name}{shown}: {message}"
