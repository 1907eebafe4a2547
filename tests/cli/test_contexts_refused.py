"""What `ttt-e2e read`, `generate`, `chat` and `serve` refuse before any work."""

import shutil
import socket
import sys
from collections import namedtuple

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ttt_e2e import TTTE2ECache
from ttt_e2e.serving import check_room

from ..serving.small import files, save_text_model, small_text_model
from .context_commands import PROMPT, app, fill_place, refused, run


@pytest.fixture(scope="module")
def text_model():
    return small_text_model()


@pytest.fixture(scope="module")
def place(text_model, tmp_path_factory):
    return fill_place(tmp_path_factory.mktemp("place"), text_model)


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").write_bytes(b"\0\1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    return tmp_path


def test_reading_what_cannot_be_read(place, bad):
    for name, complaint in {
        "missing.txt": "no such file",
        "empty.txt": "empty",
        "binary": "NUL",
        "full": "not a",
    }.items():
        assert refused(run(place, "read", "--document", bad / name, "--output", bad / "out"), name, complaint)
    read_book = ("read", "--document", place / "book.txt", "--output")
    assert refused(run(place, *read_book, bad / "full"), "holds other files")
    assert refused(run(place, *read_book, bad / "out", "--context", bad / "full"), "no learned context")
    assert refused(run(place, *read_book, bad / "out", "--dtype", "int8"), "int8", "float32")
    assert refused(run(place, *read_book, bad / "out", "--device", "gpu"), "gpu")
    assert not (bad / "out").exists() and files(bad / "full") == {"file": b"x"}


@pytest.mark.parametrize("command", ["read", "generate"])
def test_a_context_that_could_not_be_written_is_noticed_before_anything_is_read(place, tmp_path, monkeypatch, command):
    def fail(*arguments, **keywords):
        raise AssertionError("it was read")

    monkeypatch.setattr("ttt_e2e.serving.documents.read_tokens", fail)
    monkeypatch.setattr("ttt_e2e.serving.write", fail)
    options = {
        "read": ("--document", place / "book.txt", "--output", tmp_path),
        "generate": ("--prompt", PROMPT, "--save-context", tmp_path),
    }[command]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
        assert refused(run(place, command, *options), "learned context needs", "1000 left")
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path == tmp_path.resolve())
    assert refused(run(place, command, *options), "a disk is mounted there")
    assert not list(tmp_path.iterdir())


def test_a_learned_context_is_no_larger_than_what_is_checked(place, text_model, monkeypatch):
    needed = []
    monkeypatch.setattr("ttt_e2e.serving.contexts.check_disk_space", lambda folder, size, what: needed.append(size))
    cache = TTTE2ECache.from_pretrained(place / "book", text_model.model)
    check_room(place / "other", text_model.model, cache.columns)
    assert cache.nbytes <= needed[0] < 2 * cache.nbytes


def test_an_interrupted_reading_leaves_nothing(place, tmp_path, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("ttt_e2e.serving.documents.read_tokens", interrupt)
    done = run(place, "read", "--document", place / "book.txt", "--output", tmp_path / "context")
    assert done.exit_code == 130 and "nothing was written" in done.output and not list(tmp_path.iterdir())


def test_writing_what_cannot_be_written(place, bad):
    assert refused(run(place, "generate"), "--prompt", "--prompt-file")
    assert refused(run(place, "generate", "--prompt", ""), "--prompt is empty")
    assert refused(run(place, "generate", "--prompt", "x", "--prompt-file", bad / "empty.txt"), "either")
    assert refused(run(place, "generate", "--prompt-file", bad / "empty.txt"), "empty.txt is empty")
    assert refused(run(place, "generate", "--prompt", "x", "--temperature", -1), "temperature=-1")
    assert refused(run(place, "generate", "--prompt", "x", "--learn-from", "all"), "learn_from='all'", "prompt")
    assert refused(run(place, "generate", "--prompt", "x", "--save-context", bad / "full"), "holds other files")
    assert refused(run(place, "generate", "--prompt", "x", "--max-new-tokens", 0), "max-new-tokens")


def test_contexts_that_do_not_fit(place, bad, text_model):
    save_text_model(small_text_model(seed=1), bad / "other")
    for command, options in {"generate": ("--prompt", "x"), "chat": ()}.items():
        context = ("--context", place / "book")
        assert refused(run(bad, command, *options, *context, model="other"), "other weights", place / "book")
    read_book = ("read", "--document", place / "book.txt", "--output", bad / "out", "--context", place / "book")
    assert refused(run(bad, *read_book, model="other"), "other weights")
    damaged = bad / "damaged"
    damaged.mkdir()
    for name, data in files(place / "book").items():
        (damaged / name).write_bytes(data[:-1])
    assert refused(run(place, "generate", "--prompt", "x", "--context", damaged), "damaged")


def test_models_that_cannot_be_used(place, bad, text_model):
    assert refused(run(bad, "generate", "--prompt", "x", model="missing"), "missing")
    text_model.model.save_pretrained(bad / "bare")
    assert refused(run(bad, "generate", "--prompt", "x", model="bare"), "bare", "no tokenizer")
    save_text_model(text_model, bad / "lacking")
    tensors = load_file(bad / "lacking" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, bad / "lacking" / "model.safetensors", {"format": "pt"})
    assert refused(run(bad, "generate", "--prompt", "x", model="lacking"), "model.norm.weight is missing")
    preset = CliRunner().invoke(app, ["chat", "--model", "tiny"], env={"COLUMNS": "400"})
    assert refused(preset, "tiny", "no trained weights")
    plain = CliRunner().invoke(app, ["chat", "--model", "tiny-mamba2"], env={"COLUMNS": "400"})
    assert refused(plain, "tiny-mamba2")


def test_a_server_that_cannot_listen(place, bad):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(run(place, "serve", "--port", port), f"--port {port}", "choose another port")
    limits = run(place, "serve", "--port", 0, "--default-max-tokens", 9, "--max-tokens", 5)
    assert refused(limits, "--default-max-tokens 9", "at most --max-tokens", "5")
    missing = run(place, "serve", "--port", 0, "--contexts", bad / "missing")
    assert refused(missing, "missing", "no such folder")


def test_a_server_without_its_packages(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert refused(run(place, "serve"), "pip install", "serve")
