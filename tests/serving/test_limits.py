"""What clients may ask of the server: everything else is a 400 that names it, and nobody keeps others from answers."""

import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from ttt_e2e.serving import ContextFolder, text_tokens

from ..modeling.helpers import BATCH
from .running import MOST, PROMPTS, TOKENS, complaint, wait_until
from .small import BOOK

MESSAGE = {"role": "user", "content": "x"}
DEEP = "[" * 100_000 + "]" * 100_000
SLOW = "{% for i in range(10000000) %}{% endfor %}"


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = {"a": value}
    return value


def config(**fields):
    return {"generation_config": json.dumps(fields)}


FIELDS = {
    "tiny-temperature": ({"temperature": 1e-300}, "temperature=1e-300"),
    "high-temperature": ({"temperature": 9}, "temperature=9"),
    "temperature-without-a-number": ({"temperature": float("nan")}, "temperature=nan"),
    "top-p-without-a-number": ({"top_p": float("nan")}, "top_p=nan"),
    "endless-penalty": ({"frequency_penalty": float("inf")}, "frequency_penalty=inf"),
    "penalty-that-divides-by-nothing": ({"frequency_penalty": -0.9999999999999999}, "frequency_penalty"),
    "bias-without-a-number": ({"logit_bias": {"5": float("nan")}}, "logit_bias.5=nan"),
    "endless-bias": ({"logit_bias": {"5": float("inf")}}, "logit_bias.5=inf"),
    "overflowing-bias": ({"logit_bias": {"5": 1e39}}, "logit_bias.5"),
    "bias-of-no-token": ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    "bias-outside": ({"logit_bias": {"999": 1}}, "logit_bias: there is no token 999"),
    "biases": ({"logit_bias": {str(n): 1 for n in range(5000)}}, "logit_bias"),
    "stop-strings": ({"stop": ["x"] * 100_000}, "stop"),
    "long-stop-string": ({"stop": "x" * 10_000}, "stop"),
    "many-tokens": ({"max_tokens": MOST + 1}, f"at most {MOST}"),
    "long-context-name": ({"context": "x" * 100_000}, "context"),
    "deep-request": ({"metadata": nested(500)}, "deeper than"),
    "config-dict-output": (config(return_dict_in_generate=True), "return_dict_in_generate=True"),
    "config-scores": (config(output_scores=True), "output_scores=True"),
    "config-sequences": (config(num_return_sequences=3), "num_return_sequences=3"),
    "config-beams": (config(num_beams=4), "num_beams=4"),
    "config-without-cache": (config(use_cache=False), "use_cache=False"),
    "config-forced-end": (config(forced_eos_token_id=10**6), "forced_eos_token_id: there is no token 1000000"),
    "config-forced-begin": (config(forced_bos_token_id=300), "forced_bos_token_id: there is no token 300"),
    "config-negative-end": (config(eos_token_id=[-7]), "eos_token_id"),
    "config-suppressed": (config(suppress_tokens=[5, 300]), "suppress_tokens: there is no token 300"),
    "config-many-suppressed": (config(suppress_tokens=[5] * 100_000), "suppress_tokens"),
    "config-words": (config(bad_words_ids=[[]]), "bad_words_ids=[[]]"),
    "config-bias": (config(sequence_bias=[[[5], "x"]]), "sequence_bias"),
    "config-temperature": (config(temperature=1e-300, do_sample=True), "generation_config.temperature"),
    "config-top-k": (config(top_k=0.5, do_sample=True), "generation_config.top_k"),
    "config-penalty": (config(repetition_penalty=float("nan")), "generation_config.repetition_penalty=nan"),
    "config-stops": (config(stop_strings=["x"] * 1000), "generation_config.stop_strings"),
    "config-tokens": (config(max_new_tokens=MOST + 1), f"generation_config.max_new_tokens={MOST + 1}"),
    "config-cache": (config(cache_implementation="static"), "cache_implementation"),
    "config-compile": (config(compile_config={"mode": "x"}), "compile_config"),
    "config-watermark": (config(watermarking_config={"x": 1}), "watermarking_config"),
    "config-half-character": ({"generation_config": '{"stop_strings": "\\ud800"}'}, "not Unicode"),
    "config-deep": ({"generation_config": DEEP}, "generation_config"),
    "config-deep-value": (config(stop_strings=nested(500)), "deeper than"),
    "config-long-number": ({"generation_config": '{"top_k": ' + "9" * 5000 + "}"}, "generation_config"),
}
PROMPT_FIELDS = {
    "prompts": ({"prompt": ["x"] * 1000}, "prompt"),
    "no-prompts": ({"prompt": []}, "prompt"),
    "mixed-prompts": ({"prompt": ["x", 5]}, "prompt"),
    "empty-prompt": ({"prompt": ["x", ""]}, "prompt"),
    "token-outside": ({"prompt": [5, 300]}, "prompt: there is no token 300"),
    "negative-token": ({"prompt": [[5], [-1]]}, "prompt"),
    "stream-of-several": ({"prompt": ["x", "y"], "stream": True}, "stream=True"),
}
CHAT_FIELDS = {
    "own-template": ({"chat_template_kwargs": {"chat_template": SLOW}}, "chat_template_kwargs.chat_template"),
    "tokenize": ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize=False"),
    "conversation": ({"chat_template_kwargs": {"conversation": []}}, "chat_template_kwargs.conversation"),
    "unpacked": ({"chat_template_kwargs": {"return_dict": False}}, "chat_template_kwargs.return_dict"),
    "spelled-out": ({"chat_template_kwargs": {"sanitize_control_tokens": False}}, "sanitize_control_tokens"),
    "tokenizer-options": ({"chat_template_kwargs": {"tokenizer_kwargs": {"x": 1}}}, "tokenizer_kwargs"),
    "thinking": ({"chat_template_kwargs": {"enable_thinking": "no"}}, "enable_thinking='no'"),
    "documents": ({"chat_template_kwargs": {"documents": [5]}}, "documents"),
    "messages": ({"messages": [MESSAGE] * 10_000}, "messages"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 5000}]}, "messages"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "image_url"),
    "tools": ({"tools": [{}] * 1000}, "tools"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": [{}] * 1000}]}, "tool_calls"),
    "deep-arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}]},
        "messages",
    ),
}
CASES = {
    **{f"completions-{name}": ("completions", *case) for name, case in (FIELDS | PROMPT_FIELDS).items()},
    **{f"chat-{name}": ("chat/completions", *case) for name, case in (FIELDS | CHAT_FIELDS).items()},
}


@pytest.mark.parametrize(("path", "changes", "named"), CASES.values(), ids=CASES)
def test_what_no_client_may_ask_is_named(served, path, changes, named):
    text = {"prompt": "x"} if path == "completions" else {"messages": [MESSAGE]}
    limit = {} if "generation_config" in changes else {"max_tokens": 2}
    answer = served.post(path, **({"model": "small"} | text | limit | changes))
    assert answer.status_code == 400 and named in complaint(answer) and len(complaint(answer)) < 3000


VALUES = [None, True, -1, 0, 0.5, 2, 1e-300, 1e308, float("nan"), 10**20, "", "x", "\0", "5", [], [[]], ["x"], [5], {}]
VALUES += [{"x": 1}, {"5": 1}, [{}], [None], [["x"]], nested(3), "[1]", "{}", '{"max_new_tokens": 2}']
NAMES = "prompt messages stop temperature top_p logit_bias seed frequency_penalty generation_config context model n "
NAMES += "tools chat_template_kwargs suffix stream max_tokens max_completion_tokens learn_from user stream_options"


def test_no_request_makes_the_server_fail(served):
    """Fields of every kind of value, in any combination: an answer, or words about what is wrong."""
    from ttt_e2e.serving.requests import GenerationFields

    draw, names = random.Random(0), NAMES.split()
    for _ in range(300):
        path = draw.choice(["completions", "chat/completions"])
        body = {"prompt": "x"} if path == "completions" else {"messages": [MESSAGE]}
        body |= {"max_tokens": 1, **{name: draw.choice(VALUES) for name in draw.sample(names, draw.randint(1, 2))}}
        answer = served.post(path, **body)
        assert answer.status_code in (200, 400, 404, 422), body
        assert '"error"' not in answer.text if answer.status_code == 200 else complaint(answer), body
    ways = [*GenerationFields.model_fields, "output_logits", "prefill_chunk_size", "max_length", "guidance_scale"]
    for _ in range(100):
        fields = {name: draw.choice([*VALUES, 0.01, [5, 6], 299]) for name in draw.sample(ways, draw.randint(1, 2))}
        answer = served.post(prompt="x", **config(**{"max_new_tokens": 1, "do_sample": True} | fields))
        assert answer.status_code in (200, 400), fields
    for name in ("role", "content", "tool_calls", "tool_call_id", "name"):
        for value in VALUES:
            answer = served.post("chat/completions", messages=[MESSAGE | {name: value}], max_tokens=1)
            assert answer.status_code in (200, 400), (name, value)
    for value in VALUES:
        answer = requests.post(f"{served.url}/load_model", data=json.dumps({"model": value}), timeout=60)
        assert answer.status_code in (200, 400, 422)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{"suppress_tokens": [*range(300)]}, {"no_repeat_ngram_size": 1}], ids=str)
def test_no_token_is_drawn_where_all_are_forbidden(served, fields, stream):
    answer = served.post(prompt="x", **config(**fields, max_new_tokens=310, do_sample=True), stream=stream)
    assert answer.status_code == (200 if stream else 400) and "every token is forbidden" in answer.text


def test_fields_of_a_template_that_harm_nobody(served, monkeypatch):
    template = "{{ bos_token }}{% if not enable_thinking %}{{ documents[0]['text'] }}{% endif %}"
    monkeypatch.setattr(served.text_model.tokenizer, "chat_template", template)
    fields = {"enable_thinking": False, "add_generation_prompt": True, "documents": [{"text": PROMPTS[0]}]}
    answer = served.client.chat.completions.create(
        model="small",
        messages=[MESSAGE],
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"chat_template_kwargs": fields},
    )
    assert answer.choices[0].message.content == served.expected(PROMPTS[0])


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_others_are_answered_while_a_prompt_is_prepared(served, monkeypatch, path):
    begun, go_on, kind = threading.Event(), threading.Event(), type(served.text_model.tokenizer)
    name = "__call__" if path == "completions" else "apply_chat_template"
    prepare = getattr(kind, name)

    def held_up(*arguments, **options):
        begun.set()
        assert go_on.wait(30)
        return prepare(*arguments, **options)

    monkeypatch.setattr(kind, name, held_up)
    body = {"prompt": "x"} if path == "completions" else {"messages": [MESSAGE]}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.post, path, **body, max_tokens=2)
        assert begun.wait(30)
        assert requests.get(f"{served.url}/health", timeout=10).json() == {"status": "ok"}
        assert not asked.done()
        go_on.set()
        assert asked.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_reading_ends_where_the_client_goes_away(served, stream):
    """A prompt of many pieces, of which the client waits for the first only."""
    begun, go_on, count = threading.Event(), threading.Event(), [0]

    def held_up(*arguments):
        count[0] += 1
        begun.set()
        assert go_on.wait(30)

    prompt = " ".join([BOOK] * 20)
    body = {"model": "small", "prompt": prompt, "max_tokens": 1, "stream": stream, "temperature": 0}
    hook = served.text_model.model.model.layers[-1].input_layernorm.register_forward_pre_hook(held_up)
    try:
        with pytest.raises(requests.RequestException):
            requests.post(f"{served.url}/v1/completions", json=body, timeout=0.5)
        assert begun.wait(30)
        wait_until(lambda: False, seconds=1)  # until the server has noticed
        go_on.set()
        assert served.complete(PROMPTS[0], max_tokens=1)  # comes after the first request
        hook.remove()
        mini_batches = len(text_tokens(prompt, served.text_model.tokenizer, begin=True)) // BATCH
        assert count[0] < mini_batches / 2
    finally:
        go_on.set()
        hook.remove()


@pytest.mark.parametrize(
    "content", [DEEP, f'{{"prompt": "x", "metadata": {DEEP}}}', '{"seed": ' + "9" * 5000 + "}"], ids=len
)
def test_bodies_that_cannot_be_parsed(served, content):
    answer = served.post(content=content)
    assert answer.status_code in (400, 422) and len(complaint(answer)) < 3000


def test_a_request_that_names_no_number_of_tokens(served):
    for path, body in {"completions": {"prompt": "x"}, "chat/completions": {"messages": [MESSAGE]}}.items():
        for more in ({}, config(do_sample=False)):
            answer = served.post(path, **body, **more).json()
            assert answer["usage"]["completion_tokens"] <= TOKENS
    assert answer["usage"]["completion_tokens"] == TOKENS or answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("context", [None, "book"])
@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts(served, context, as_ids):
    prompts, tokenizer = PROMPTS[:3], served.text_model.tokenizer
    sent = [text_tokens(one, tokenizer, begin=context is None).tolist() for one in prompts] if as_ids else prompts
    extra = {} if context is None else {"context": context}
    answer = served.client.completions.create(
        model="small", prompt=sent, max_tokens=TOKENS, temperature=0, extra_body=extra
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [served.expected(one, context) for one in prompts]
    assert answer.usage.completion_tokens == 3 * TOKENS
    assert served.complete(sent[0], extra_body=extra) == answer.choices[0].text


def test_a_route_that_does_not_exist(served):
    for path, method in {"v1/complete": "POST", "docs": "GET", "v1/completions": "GET", "": "GET"}.items():
        answer = requests.request(method, f"{served.url}/{path}", timeout=60)
        assert answer.status_code in (404, 405)
        assert "POST /v1/chat/completions" in complaint(answer) and f"/{path}'" in complaint(answer)


HOSTS = {"localhost": 200, "LOCALHOST.:80": 200, "127.0.0.1": 200, "[::1]:9": 200, "127.3.2.1:8000": 200}
OTHERS = ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "[::2]", "", "localhost:80:80"]
OTHERS += ["127.0.0.1.evil.example", "::1.evil.example", "0x7f.1"]
HOSTS |= dict.fromkeys(OTHERS, 403)


@pytest.mark.parametrize(("host", "status"), HOSTS.items(), ids=HOSTS)
def test_only_the_names_of_this_machine(served, host, status):
    answer = requests.get(f"{served.url}/v1/models", headers={"host": host}, timeout=60)
    assert answer.status_code == status
    assert status == 200 or ("--allow-host" in complaint(answer) and repr(host) in complaint(answer))


def test_names_that_are_allowed():
    from ttt_e2e.serving.doors import HostCheck

    named = HostCheck(None, names=["Box.example", "0.0.0.0", ""], any_address=True)
    assert all(map(named.accepts, ["box.example:80", "10.0.0.1:8000", "[fe80::1]:80", "[fe80::1]", "localhost"]))
    assert not any(map(named.accepts, ["evil.example", "a.box.example", "10.0.0.1.evil.example", ""]))


def test_links_are_not_followed(served, tmp_path):
    """Of a whole context, of one of its files, or of a folder of contexts; and odd names harm nobody."""
    book, inside = served.folder / "book", tmp_path / "contexts"
    for name in ("part", "odd\nname", "pipe"):
        (inside / name).mkdir(parents=True)
        for path in book.iterdir():
            (inside / name / path.name).write_bytes(path.read_bytes())
    (inside / "whole").symlink_to(book)
    (inside / "above").symlink_to(served.folder)
    (inside / "part" / "documents.json").unlink()
    (inside / "part" / "documents.json").symlink_to(book / "documents.json")
    (inside / "pipe" / "documents.json").unlink()
    os.mkfifo(inside / "pipe" / "documents.json")
    os.mkdir(os.fsencode(inside) + b"/\xff")
    (inside / os.fsdecode(b"\xff") / "context.json").write_text("{}")
    contexts = ContextFolder(inside, served.text_model.model)
    assert contexts.names() == []
    for name in ("whole", "above", "part", "pipe", "above/book", "odd\nname", "", ".", "..", "\0", "a" * 5000):
        with pytest.raises(KeyError):
            contexts.open(name)
    linked = tmp_path / "linked"
    linked.symlink_to(served.folder)
    assert ContextFolder(linked, served.text_model.model).names() == ["book", "tale"]  # the one who serves chose it


def test_broken_contexts_are_told(served):
    facts = {"columns": "many", "pending_ids": [[-5]], "documents": DEEP}
    for name, content in {"no-json": "{", "deep": DEEP, "wrong": json.dumps(facts), "empty": ""}.items():
        folder = served.folder / f"broken-{name}"
        folder.mkdir()
        for path in (served.folder / "book").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for file in ("documents.json", "context.json"):
            (folder / file).write_text(content)
            answer = served.post(model=f"small:{folder.name}", prompt="x", max_tokens=2)
            assert answer.status_code == 400 and folder.name in complaint(answer)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
