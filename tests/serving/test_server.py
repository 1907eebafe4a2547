"""The server, asked by OpenAI's client: what it answers is what `generate` writes, whoever else is asking."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from transformers import GenerationConfig

from ttt_e2e import TTTE2ECache
from ttt_e2e.serving import Turns, text_tokens

from .running import LIMIT, PROMPTS, TOKENS, Served, complaint, wait_until
from .small import BOOK, files, small_text_model


@pytest.fixture
def alive(monkeypatch):
    """The learned contexts in memory that a request of this test has read into."""
    known, store = weakref.WeakSet(), TTTE2ECache.store
    known.read_into = 0

    def watched(cache, *arguments):
        known.add(cache)
        known.read_into += 1
        return store(cache, *arguments)

    monkeypatch.setattr(TTTE2ECache, "store", watched)
    return known


def test_a_completion_is_what_generate_writes(served):
    answer = served.client.completions.create(model="small", prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0)
    assert answer.choices[0].text == served.expected(PROMPTS[0])
    assert answer.choices[0].finish_reason == "length" and answer.model == "small"
    assert answer.usage.completion_tokens == TOKENS


def test_streaming_gives_the_same(served):
    arguments = {"model": "small", "max_tokens": TOKENS, "temperature": 0}
    stream = served.client.completions.create(prompt=PROMPTS[0], stream=True, **arguments)
    pieces = [chunk.choices[0].text for chunk in stream]
    whole = served.expected(PROMPTS[0])
    # The end of a character that was not written to its end is shown by the one and held back by the other.
    assert len(pieces) > 2 and "".join(pieces) == whole[: len("".join(pieces))] and whole.rstrip("\ufffd") in whole


def test_a_chat_is_what_generate_writes(served):
    messages = [{"role": "user", "content": "why?"}]
    arguments = {"model": "small", "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    expected = served.expected(Turns(served.text_model.tokenizer).first("why?", begin=True))
    assert served.client.chat.completions.create(**arguments).choices[0].message.content == expected
    chunks = list(served.client.chat.completions.create(stream=True, **arguments))
    written = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert written and expected.startswith(written) and chunks[-1].usage.completion_tokens == TOKENS


def test_special_tokens_that_a_request_spells_out_are_letters(served, monkeypatch):
    tokenizer, text, read = served.text_model.tokenizer, "the mill<end> and<begin>", []
    generate = served.text_model.model.generate

    def watch(**arguments):
        read.append(arguments["input_ids"][0].tolist())
        return generate(**arguments)

    monkeypatch.setattr(served.text_model.model, "generate", watch)
    served.complete(text)
    messages = [{"role": "user", "content": text}]
    served.client.chat.completions.create(model="small", messages=messages, max_tokens=TOKENS, temperature=0)
    prompt = text_tokens(text, tokenizer, begin=True).tolist()
    assert read == [prompt, Turns(tokenizer).first(text, begin=True)] and tokenizer.eos_token_id not in prompt
    assert tokenizer(text).input_ids.count(tokenizer.eos_token_id) == 1  # as it would be read otherwise


@pytest.mark.parametrize("context", ["book", "tale"])
def test_a_request_goes_on_from_a_named_context(served, context):
    before = files(served.folder / context)
    expected = served.expected(PROMPTS[0], context)
    assert expected != served.expected(PROMPTS[0])
    for arguments in ({"extra_body": {"context": context}}, {"model": f"small:{context}"}):
        assert served.complete(PROMPTS[0], **arguments) == expected
    assert files(served.folder / context) == before


def test_a_chat_goes_on_from_a_named_context(served):
    messages = [{"role": "user", "content": "why?"}]
    answer = served.client.chat.completions.create(
        model="small:book", messages=messages, max_tokens=TOKENS, temperature=0
    )
    expected = served.expected(Turns(served.text_model.tokenizer).first("why?", begin=False), "book")
    assert answer.choices[0].message.content == expected


def test_learn_from_is_that_of_generate(served):
    prompt = BOOK[:100]
    written = {learn: served.complete(prompt, extra_body={"learn_from": learn}) for learn in ("context", "none")}
    assert written == {learn: served.expected(prompt, learn_from=learn) for learn in written}
    assert written["context"] != written["none"]


def test_models_are_listed_with_their_contexts(served):
    assert [model.id for model in served.client.models.list()] == ["small", "small:book", "small:tale"]
    assert requests.get(f"{served.url}/health", timeout=60).json() == {"status": "ok"}


def test_eight_clients_get_what_each_gets_alone(served):
    contexts = [None, "book", "tale", "book", None, "tale", "book", None]
    expected = [served.expected(*one) for one in zip(PROMPTS, contexts, strict=True)]
    barrier = threading.Barrier(8)

    def ask(prompt, context):
        barrier.wait()
        return served.complete(prompt, extra_body={} if context is None else {"context": context})

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS, contexts)) == expected


def test_the_docs_examples_for_curl_work(served):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    examples = [part.split("\n\n")[0] for part in page.split("\n    curl ")[1:]]
    assert len(examples) == 3
    for example in examples:
        command = f"{curl} -sS {example}".replace("http://127.0.0.1:8000", served.url).replace(
            "tiny:book", "small:book"
        )
        answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "ttt_e2e_generation_tokens_total" in answer or json.loads(answer)["usage"]["completion_tokens"] == 16


def test_metrics_are_prometheus_s(served):
    def numbers():
        answer = requests.get(f"{served.url}/metrics", timeout=60)
        assert answer.headers["content-type"].startswith("text/plain")
        families = prometheus_client.text_string_to_metric_families(answer.text)
        return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}

    prometheus_client = pytest.importorskip("prometheus_client.parser", reason="needs the extra serve")
    before = numbers()
    served.complete("a text that nobody has sent before")
    after = numbers()
    assert after["ttt_e2e_generation_tokens_total"] - before["ttt_e2e_generation_tokens_total"] == TOKENS
    assert after["ttt_e2e_prompt_tokens_total"] > before["ttt_e2e_prompt_tokens_total"]
    assert after["ttt_e2e_requests_waiting"] == after["ttt_e2e_rows_reading"] == 0


def test_a_conversation_reads_only_what_is_new(served):
    """As clients send it: all messages again with every turn."""

    def reused():
        text = requests.get(f"{served.url}/metrics", timeout=60).text
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith("ttt_e2e_reused_tokens_t")))

    before, ids = reused(), text_tokens("one text, two questions about it", served.text_model.tokenizer, True).tolist()
    first = served.expected(ids)
    assert served.complete(ids) == first and reused() == before
    assert served.complete([*ids, 70, 71]) == served.expected([*ids, 70, 71])
    assert reused() == before + len(ids)


def test_the_same_seed_samples_the_same(served):
    """Also while others sample."""
    ask = {"temperature": 1.0, "max_tokens": 8}
    alone = served.complete(PROMPTS[0], seed=3, **ask)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(served.complete, prompt, **ask) for prompt in PROMPTS[1:4]]
        again = served.complete(PROMPTS[0], seed=3, **ask)
        assert all(other.result() for other in others)
    assert again == alone and served.complete(PROMPTS[0], seed=4, **ask) != alone


def test_a_seed_is_of_its_own_request_only(served):
    ask, texts = {"temperature": 1.5, "max_tokens": 8}, []
    for _ in range(3):
        served.complete(PROMPTS[0], seed=3, **ask)
        texts.append(served.complete(PROMPTS[1], **ask))
    assert len(set(texts)) > 1


def test_a_temperature_is_not_ignored(served):
    texts = {served.complete(PROMPTS[0], temperature=1.5, seed=seed) for seed in range(3)}
    assert len(texts) > 1


@pytest.mark.parametrize("context", [None, "book"])
def test_a_client_that_goes_away_frees_its_memory(served, alive, context):
    body = {"model": "small", "prompt": PROMPTS[0], "max_tokens": 100_000, "stream": True, "temperature": 0}
    body |= {} if context is None else {"context": context}
    with requests.post(f"{served.url}/v1/completions", json=body, stream=True, timeout=60) as response:
        lines = response.iter_lines()  # dropped, it would close the connection
        next(lines)
        assert wait_until(lambda: alive and alive.read_into > 2)
    assert wait_until(lambda: not alive)
    assert served.complete(PROMPTS[1]) == served.expected(PROMPTS[1])


def test_a_client_that_does_not_wait_frees_its_memory(served, alive):
    body = {"model": "small", "prompt": PROMPTS[0], "max_tokens": 100_000, "temperature": 0}
    with pytest.raises(requests.Timeout):
        requests.post(f"{served.url}/v1/completions", json=body, timeout=0.5)
    assert wait_until(lambda: not alive) and alive.read_into
    assert served.complete(PROMPTS[1]) == served.expected(PROMPTS[1])


def test_nothing_is_read_for_a_client_that_went_away_while_it_waited(served, monkeypatch):
    model, read, go_on = served.text_model.model, [], threading.Event()
    generate, expected = model.generate, served.expected(PROMPTS[0])

    def held_up(**arguments):
        read.append(arguments["input_ids"].shape[1])
        go_on.wait(30)
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", held_up)
    body = {"model": "small", "prompt": PROMPTS[1], "max_tokens": 2}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.complete, PROMPTS[0])
        assert wait_until(lambda: len(read) == 1)
        with pytest.raises(requests.Timeout):
            requests.post(f"{served.url}/v1/completions", json=body, timeout=0.5)
        time.sleep(1)  # until the server has noticed
        go_on.set()
        assert first.result() == expected
    served.complete(PROMPTS[2])  # comes after all that waited
    assert len(read) == 2


def test_a_generation_config_as_transformers_chat_sends_it(served):
    config = GenerationConfig(max_new_tokens=5, do_sample=False).to_json_string()
    answer = served.client.completions.create(
        model="small", prompt=PROMPTS[0], extra_body={"generation_config": config}
    )
    assert answer.choices[0].text == served.expected(PROMPTS[0], tokens=5)


def test_a_bias_reaches_both_kinds_of_requests(served):
    token, arguments = 70, {"model": "small", "max_tokens": TOKENS, "temperature": 0, "logit_bias": {"70": 100}}
    expected = served.text_model.tokenizer.decode([token] * TOKENS)
    assert served.client.completions.create(prompt="x", **arguments).choices[0].text == expected
    messages = [{"role": "user", "content": "x"}]
    chat = served.client.chat.completions.create(messages=messages, **arguments)
    assert chat.choices[0].message.content == expected
    assert served.complete(PROMPTS[0], logit_bias={}) == served.expected(PROMPTS[0])


def test_a_bias_outside_the_vocabulary(served):
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for token in ("999", "-1"):
        answer = served.post("chat/completions", **body, logit_bias={token: 5})
        assert answer.status_code == 400 and ("999" in complaint(answer) or "logit_bias" in complaint(answer))


BAD = {
    "unknown-model": ({"model": "gpt-9"}, 404, "small:book"),
    "unknown-context": ({"context": "diary"}, 404, "book, tale"),
    "unknown-context-of-model": ({"model": "small:diary"}, 404, "book, tale"),
    "escaping-context": ({"context": "../contexts/book"}, 404, "no such learned context"),
    "absolute-context": ({"model": "small:/etc"}, 404, "no such learned context"),
    "two-contexts": ({"model": "small:book", "context": "tale"}, 400, "one context"),
    "context-of-a-wrong-kind": ({"context": 3}, 400, "context"),
    "negative-max-tokens": ({"max_tokens": -3}, 400, "max_tokens"),
    "zero-max-tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "text-as-max-tokens": ({"max_tokens": "many"}, 400, "max_tokens"),
    "negative-temperature": ({"temperature": -1}, 400, "temperature"),
    "top-p": ({"top_p": 0}, 400, "top_p"),
    "seed": ({"seed": -1}, 400, "seed"),
    "stop": ({"stop": [""]}, 400, "stop"),
    "learn-from": ({"learn_from": "all"}, 400, "learn_from"),
    "several-answers": ({"n": 2}, 400, "n=2"),
    "generation-config": ({"generation_config": "[1]"}, 400, "generation_config"),
    "generation-config-that-is-no-json": ({"generation_config": "{max"}, 400, "generation_config"),
    "generation-config-out-of-range": ({"generation_config": '{"max_new_tokens": -1}'}, 400, "max_new_tokens"),
    "unknown-way-of-writing": ({"generation_config": '{"prompt_lookup_num_tokens": 2}'}, 400, "prompt_lookup"),
    "too-many-tokens": ({"max_tokens": 10**30}, 400, "max_tokens"),
    "unknown-field": ({"max_token": 3}, 422, "max_token"),
    "empty-prompt": ({"prompt": ""}, 400, "prompt"),
    "no-prompt": ({"prompt": None}, 400, "prompt"),
    "suffix-of-a-wrong-kind": ({"suffix": 5}, 400, "suffix"),
    "half-a-character": ({"prompt": "\ud800"}, 400, "not Unicode"),
    "suffix-with-half-a-character": ({"suffix": "\ud800"}, 400, "not Unicode"),
}


@pytest.mark.parametrize(("changes", "status", "named"), BAD.values(), ids=BAD)
def test_bad_requests_are_told_why(served, changes, status, named):
    answer = served.post(**({"model": "small", "prompt": "x", "max_tokens": 2} | changes))
    assert answer.status_code == status and named in complaint(answer)


@pytest.mark.parametrize("messages", [[], None, "hello", [{"content": "x"}], [{"role": "user", "content": 3}]], ids=str)
def test_bad_messages_are_told_why(served, messages):
    answer = served.post("chat/completions", model="small", messages=messages)
    assert answer.status_code == 400 and "messages" in complaint(answer)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: the model's chat template"),
        ({"tools": ["f"]}, "tools"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "arguments"),
    ],
    ids=["tools", "tools-of-a-wrong-kind", "template-arguments", "calls", "calls-without-arguments"],
)
def test_what_the_template_cannot_use_is_told(served, fields, named):
    messages = [{"role": "user", "content": "x"}]
    answer = served.post("chat/completions", **({"model": "small", "messages": messages, "max_tokens": 2} | fields))
    assert answer.status_code == 400 and named in complaint(answer)


def test_what_the_template_refuses_is_told(served, monkeypatch):
    refusing = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(served.text_model.tokenizer, "chat_template", refusing)
    answer = served.post("chat/completions", model="small", messages=[{"role": "user", "content": "x"}])
    assert answer.status_code == 400 and "roles must alternate" in complaint(answer)


def test_the_client_raises_its_own_errors(served):
    import openai

    with pytest.raises(openai.NotFoundError, match="there are book, tale"):
        served.complete("x", extra_body={"context": "diary"})
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        served.complete("x", max_tokens=-1)


def test_bodies_that_are_no_request(served):
    for content in ("{no json", "[1]", b"\xff\xfe"):
        answer = served.post(content=content)
        assert answer.status_code in (400, 422) and complaint(answer)
    unnamed = requests.post(f"{served.url}/v1/completions", data=b"\xff\xfe", timeout=60)  # no content type
    assert unnamed.status_code == 422 and complaint(unnamed)
    too_long = served.post(model="small", prompt="x" * 10 * LIMIT)
    assert too_long.status_code == 413 and "ttt-e2e read" in complaint(too_long)
    chunks = (b"x" * (LIMIT // 4) for _ in range(10))
    assert served.post(content=chunks).status_code == 413
    assert served.complete(PROMPTS[0]) == served.expected(PROMPTS[0])


def test_transformers_chat_finds_the_model_and_no_other(served):
    for model, status in {"small": "ready", "small:book": "ready", "gpt-9": "error"}.items():
        answer = requests.post(f"{served.url}/load_model", json={"model": model}, timeout=60)
        assert json.loads(answer.text.removeprefix("data: "))["status"] == status


def test_transformers_chat_shows_the_answers(served):
    """The command itself: a message, no going on when it asks for that behind the last token, and one more."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", "small:book", f"{served.url}/v1"]
    flags, typed = ["max_new_tokens=12", "do_sample=False"], f"{PROMPTS[0]}\nn\n{PROMPTS[1]}\nn\n!exit\n"
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "400"}
    done = subprocess.run(command + flags, input=typed, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    messages, shown = [], letters(done.stdout)
    for prompt in PROMPTS[:2]:
        messages.append({"role": "user", "content": prompt})
        answer = served.client.chat.completions.create(
            model="small:book", messages=messages, max_tokens=12, temperature=0
        )
        written = answer.choices[0].message.content.rstrip("\ufffd")  # half a character is streamed when it is whole
        assert len(letters(written)) > 1 and letters(written) in shown
        messages.append({"role": "assistant", "content": written})


def letters(text: str) -> str:
    """What drawing a text as Markdown leaves as it is: letters, and the mark of half a character."""
    return re.sub("[^a-zA-Z\ufffd]", "", text)


@pytest.mark.parametrize("path", ["reset", "v1/responses", "v1/systemone", "v1/audio/transcriptions"])
def test_nothing_else_can_be_reached(served, path):
    assert requests.post(f"{served.url}/{path}", json={"model": "other"}, timeout=60).status_code == 404


def test_a_damaged_context_is_an_error_of_its_own_requests(served):
    folder = served.folder / "damaged"
    folder.mkdir()
    for name, data in files(served.folder / "book").items():
        (folder / name).write_bytes(data[: len(data) // 2] if name == "context.safetensors" else data)
    answer = served.post(model="small:damaged", prompt="x")
    assert answer.status_code == 400 and "damaged" in complaint(answer)
    assert served.complete("x", model="small:book") == served.expected("x", "book")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_a_tokenizer_without_a_template_chats_in_plain_text(tmp_path):
    with Served(tmp_path, small_text_model(chat_template=False)) as served:
        messages = [{"role": "user", "content": "why?"}]
        answer = served.client.chat.completions.create(
            model="small", messages=messages, max_tokens=TOKENS, temperature=0
        )
        turn = Turns(served.text_model.tokenizer).first("why?", begin=True)
        written = served.expected(turn)
        assert "\n\n" not in written and answer.choices[0].message.content == written
