"""`ttt-e2e read`, `generate`, `chat` and `serve`: what they keep and write."""

import io
import json
import os
import re
import signal
import sys
import threading
import time

import pytest
import requests
from safetensors.torch import load_file
from transformers import tokenization_utils_base

from ttt_e2e import TTTE2ECache
from ttt_e2e.cli.serve import serve
from ttt_e2e.serving import text_tokens

from ..serving.small import BOOK, alone, files, same, save_text_model, small_text_model
from .context_commands import DEFAULTS, PROMPT, app, fill_place, run, talk, written
from .cut_off import nobody_reads


@pytest.fixture(scope="module")
def text_model():
    return small_text_model()


@pytest.fixture(scope="module")
def place(text_model, tmp_path_factory):
    return fill_place(tmp_path_factory.mktemp("place"), text_model)


def test_reading_says_what_was_read(place, text_model, tmp_path):
    done = run(place, "read", "--document", place / "book.txt", "--output", tmp_path / "context")
    tokens = len(text_tokens(BOOK, text_model.tokenizer, begin=True))
    assert f"{tokens} tokens" in done.stdout and "a second" in done.stdout
    assert "book.txt" in (tmp_path / "context" / "documents.json").read_text()


def test_one_reading_equals_two(place, text_model, tmp_path):
    both = ("--document", place / "book.txt", "--document", place / "sequel.txt", "--output", tmp_path / "both")
    more = ("--document", place / "sequel.txt", "--output", tmp_path / "more", "--context", place / "book")
    before = files(place / "book")
    for options in (both, more):
        assert run(place, "read", *options).exit_code == 0
    one, two = (TTTE2ECache.from_pretrained(tmp_path / name, text_model.model) for name in ("both", "more"))
    assert same(one, two) and files(place / "book") == before
    assert (tmp_path / "both" / "documents.json").read_text() == (tmp_path / "more" / "documents.json").read_text()


@pytest.mark.parametrize("pipe", ["standard input", "named pipe"])
def test_a_document_from_a_pipe(place, tmp_path, pipe):
    source, typed = "-", BOOK
    if pipe == "named pipe":
        source, typed = tmp_path / "pipe", None
        os.mkfifo(source)
        threading.Thread(target=source.write_text, args=(BOOK,)).start()
    done = run(place, "read", "--document", source, "--output", tmp_path / "context", typed=typed)
    assert done.exit_code == 0, done.output
    folders = (tmp_path / "context", place / "book")
    contexts = [json.loads((folder / "documents.json").read_text()) for folder in folders]
    names = [one["documents"][0].pop("name") for one in contexts]
    assert names == ["standard input" if source == "-" else str(source), "book.txt"] and contexts[0] == contexts[1]
    tensors = [load_file(folder / "context.safetensors") for folder in folders]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])


def test_special_tokens_that_a_document_spells_out(place, text_model, tmp_path):
    (tmp_path / "tags.txt").write_text("the mill<end>")
    counts = []
    for option in ("--split-special-tokens", "--no-split-special-tokens"):
        folder = tmp_path / option
        assert run(place, "read", "--document", tmp_path / "tags.txt", "--output", folder, option).exit_code == 0
        counts.append(json.loads((folder / "documents.json").read_text())["tokens"])
    whole = len(text_model.tokenizer("the mill<end>").input_ids)
    assert counts == [len(text_tokens("the mill<end>", text_model.tokenizer, begin=True)), whole] and counts[0] > whole
    options = ("generate", "--prompt", "the mill<end>", "--max-new-tokens", 12, "--temperature", 0)
    texts = [run(place, *options, option).stdout for option in ("--split-special-tokens", "--no-split-special-tokens")]
    ids = [text_tokens("the mill<end>", text_model.tokenizer, True, split).tolist() for split in (True, False)]
    expected = [text_model.tokenizer.decode(alone(text_model, one), skip_special_tokens=True) for one in ids]
    assert texts == [f"{text}\n" for text in expected]


def test_no_text_is_called_too_long(place, text_model, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda message, *arguments: said.append(message))
    save_text_model(text_model, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text()) | {"model_max_length": 4}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    message = f"{PROMPT}<end>{PROMPT}"
    for command, options in {
        "read": ("--document", place / "book.txt", "--output", tmp_path / "new"),
        "generate": ("--prompt", message, "--max-new-tokens", 2),
        "chat": ("--max-new-tokens", 2),
    }.items():
        assert run(tmp_path, command, *options, typed=f"{message}\n").exit_code == 0
    assert said == []


@pytest.mark.parametrize("command", ["read", "generate", "chat", "serve"])
def test_what_is_loaded_is_said_before_anything_is_imported(place, tmp_path, monkeypatch, command):
    for name in ("ttt_e2e.serving", "transformers", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)  # imported, they raise
    options = {"read": ("--document", "x", "--output", tmp_path / "new"), "generate": ("--prompt", PROMPT)}
    done = run(place, command, *options.get(command, ()))
    assert done.exit_code != 0 and done.stdout == ""
    assert done.stderr.startswith(f"Loading {place / 'model'} ...\n")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_an_output_that_is_cut_off_ends_writing_quietly(place, tmp_path, monkeypatch, capsys, command):
    options = {"generate": ["--prompt", PROMPT, "--save-context", str(tmp_path / "new")], "chat": []}[command]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with pytest.raises(SystemExit, match="1"), nobody_reads():
        app([command, "--model", str(place / "model"), *options])
    said = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Loading")]
    assert said == (["No context was saved."] if command == "generate" else [])
    assert not list(tmp_path.iterdir())


def test_generating_equals_the_whole_text_as_the_prompt(place, text_model):
    before = files(place / "book")
    texts = [written(place, "--context", place / "book", "--prompt", PROMPT) for _ in "ab"]
    ids = text_tokens(BOOK, text_model.tokenizer, begin=True).tolist()
    ids += text_tokens(PROMPT, text_model.tokenizer, begin=False).tolist()
    expected = text_model.tokenizer.decode(alone(text_model, ids), skip_special_tokens=True)
    assert texts == [f"{expected}\n"] * 2
    assert files(place / "book") == before


def test_generating_without_a_context(place, text_model, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    ids = text_tokens(PROMPT, text_model.tokenizer, begin=True).tolist()
    expected = text_model.tokenizer.decode(alone(text_model, ids), skip_special_tokens=True)
    assert written(place, "--prompt", PROMPT) == f"{expected}\n"
    assert written(place, "--prompt-file", tmp_path / "prompt.txt") == f"{expected}\n"


def test_what_was_written_can_be_kept(place, text_model, tmp_path):
    written(place, "--context", place / "book", "--prompt", PROMPT, "--save-context", tmp_path / "after")
    after = TTTE2ECache.from_pretrained(tmp_path / "after", text_model.model)
    prompt = text_tokens(PROMPT, text_model.tokenizer, begin=False).tolist()
    assert after.columns == len(text_tokens(BOOK, text_model.tokenizer, begin=True)) + len(prompt) + 12
    assert written(place, "--context", tmp_path / "after", "--prompt", "x")


def test_learn_from_reaches_the_model(place):
    texts = {learn: written(place, "--prompt", BOOK, "--learn-from", learn) for learn in ("context", "none")}
    assert texts["context"] != texts["none"]


def test_a_seed_repeats_a_sample(place):
    options = ("generate", "--prompt", PROMPT, "--max-new-tokens", 12, "--temperature", 1)
    texts = [run(place, *options, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_goes_on_where_it_was_saved(place, tmp_path):
    first = talk(place, "hello", f"/save {tmp_path / 'talk'}", "why?", options=("--context", place / "book"))
    again = talk(place, "why?", options=("--context", tmp_path / "talk"))
    assert "goes on from it" in first[1]
    assert again[0] == first[2]


def test_a_text_is_read_into_a_chat(place):
    """As if it had been read before the chat, with the loss and what is kept."""
    read, asked = talk(place, f"/read {place / 'book.txt'}", "hello", "/exit")[:2]
    assert asked == talk(place, "hello", options=("--context", place / "book"))[0]
    assert re.search(r"book\.txt: [\d,]+ tokens\. Loss by quarters: (\d\.\d{3},? ?){4}nats .* MiB are kept", read)
    again = talk(place, "hello", f"/read {place / 'sequel.txt'}", "why?", "/reset", "hello")
    assert again[4] == again[0] != again[2]


def test_what_cannot_be_read_leaves_the_chat_as_it_was(place):
    shown = talk(place, "/read", "/read nowhere.txt", f"/read {place}", "hello")
    for text, named in zip(shown, ("needs a file", "no such file", "is not a file"), strict=False):
        assert named in text
    assert shown[3] == talk(place, "hello")[0]


def test_a_chat_can_be_reset(place):
    shown = talk(place, "hello", "why?", "/reset", "hello", "", "/exit", "never read")
    assert shown[3] == shown[0] != shown[1]
    assert len(shown) == 6


def test_commands_of_the_chat(place, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    lines = ("/help", "/sve x", "/save", f"/save {tmp_path / 'empty'}", "hello", f"/save {tmp_path / 'full'}")
    shown = talk(place, *lines)
    named = (
        "/reset",
        "/sve is no command",
        "needs a folder",
        "Not saved: This cache is empty",
        "",
        "holds other files",
    )
    assert all(name in text for name, text in zip(named, shown, strict=False))
    assert not (tmp_path / "empty").exists()


class Interrupts:
    """Presses Ctrl-C at the third token of the first answer."""

    def __init__(self, monkeypatch, times):
        from transformers import TextStreamer

        self.tokens, self.times, put = 0, times, TextStreamer.put

        def press(streamer, value):
            put(streamer, value)
            self.tokens += 1
            if self.tokens == 4:  # the first one is the prompt
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(TextStreamer, "put", press)


def test_an_interrupt_ends_the_answer_and_not_the_chat(place, monkeypatch):
    whole = talk(place, "hello")
    before = signal.getsignal(signal.SIGINT)
    Interrupts(monkeypatch, times=1)
    shown = talk(place, "hello", "/reset", "hello")
    # A character of several bytes may have been cut.
    assert shown[2] == whole[0] and whole[0].startswith(shown[0].rstrip("\n\ufffd")) and len(shown[0]) < len(whole[0])
    assert signal.getsignal(signal.SIGINT) is before


def test_two_interrupts_forget_the_turn(place, monkeypatch):
    whole = talk(place, "hello")
    Interrupts(monkeypatch, times=2)
    shown = talk(place, "hello", "hello")
    assert "The turn is forgotten" in shown[0] and shown[1] == whole[0]


def test_the_server_answers(place, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
    servers = []

    class Kept(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Kept)
    options = {"model": str(place / "model"), "contexts": place, "name": "small", "port": 0}
    options |= {"max_tokens": 12, "allow_host": ["box.example"]}
    thread = threading.Thread(target=serve, kwargs={**DEFAULTS, **options})
    thread.start()
    try:
        while not (servers and servers[0].started):
            assert thread.is_alive()
            time.sleep(0.05)
        url = f"http://127.0.0.1:{servers[0].servers[0].sockets[0].getsockname()[1]}/v1"
        listed = requests.get(f"{url}/models", timeout=60).json()
        body = {"model": "small:book", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        answer = requests.post(f"{url}/completions", json=body, timeout=60).json()
        longer = requests.post(f"{url}/completions", json=body | {"max_tokens": 13}, timeout=60)
        hosts = ("box.example", "evil.example")
        asked = [requests.get(f"{url}/models", headers={"host": host}, timeout=60).status_code for host in hosts]
    finally:
        servers[0].should_exit = True
        thread.join()
    assert [model["id"] for model in listed["data"]] == ["small", "small:book"]
    assert answer["choices"][0]["text"] == written(place, "--context", place / "book", "--prompt", PROMPT)[:-1]
    assert longer.status_code == 400 and "at most 12" in longer.text and asked == [200, 403]
