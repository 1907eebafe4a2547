"""Commands that write a folder leave it to the process that is writing it already, before they do any work."""

from typer.testing import CliRunner

from ttt_e2e.cli.main import app
from ttt_e2e.storage.claims import claimed

from ..storage.holding import held_elsewhere

# Neither models nor checkpoints are there: that is found later.
COMMANDS = {
    "read": ["read", "--model", "model", "--document", "text"],
    "generate": ["generate", "--model", "model", "--prompt", "text"],
    "merge": ["merge", "--adapter", "model"],
    "export": ["export", "--model", "model"],
    "convert transformer": ["convert", "transformer", "--model", "model", "--window", "8"],
    "convert official": ["convert", "official", "--checkpoint", "model", "--size", "125m"],
    "convert to-official": ["convert", "to-official", "--model", "model"],
    "convert ttt-layers": ["convert", "ttt-layers", "--checkpoint", "model"],
}


def test_the_process_that_writes_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("a text")
    with held_elsewhere(claimed, tmp_path / "output") as other:
        for name, command in COMMANDS.items():
            option = "--save-context" if name == "generate" else "--output"
            environment = {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}
            result = CliRunner().invoke(app, [*command, option, "output"], env=environment)
            assert result.exit_code == 2, (name, result.output)
            message = " ".join(result.output.replace("│", " ").split())
            assert f"process {other.pid} on " in message and "is writing there" in message, (name, message)
    assert not (tmp_path / "output").exists()
