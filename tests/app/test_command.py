"""`ttt-e2e app`: what it refuses, and that it says which package is missing."""

import socket
import sys

import pytest
from typer.testing import CliRunner

from ttt_e2e.cli.main import app


def run(*arguments):
    return CliRunner().invoke(app, ["app", *arguments], env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("launch", "page", "handlers"):
        monkeypatch.delitem(sys.modules, f"ttt_e2e.app.{name}", raising=False)
    refused = run()
    assert refused.exit_code == 2 and "pip install 'ttt-e2e[app]'" in refused.output


def test_mistakes_are_refused_before_a_model_is_loaded():
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run("--port", str(port))
    assert refused.exit_code == 2 and f"--port {port}: cannot listen there" in refused.output
    for arguments, said in (
        (["--base", "nowhere.gguf"], "there is no such file or folder"),
        (["--model", "nowhere"], "nowhere"),
        (["--dtype", "float8"], "choose one of"),
    ):
        refused = run("--port", "0", *arguments)
        assert refused.exit_code == 2 and said in refused.output, refused.output
