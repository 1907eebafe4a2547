"""Each command teaches, quickly, and refuses mistakes before any work; one whose output is cut off ends quietly."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ttt_e2e.cli import main
from ttt_e2e.cli.main import app
from ttt_e2e.configuration import preset_names, recipe_names
from ttt_e2e.configuration.demo_recipe import DEMO_RECIPE

from .cut_off import nobody_reads

# The console script's way; prints the seconds of CPU time that each help took, the start of the process in the first.
HELP_OF_ALL = """
import contextlib, io, json, resource, sys
from ttt_e2e_cli.main import app
import typer

def paths(command, path=()):
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from paths(below, (*path, name))

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

before, seconds = 0, {}
for path in paths(typer.main.get_command(app)):
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        app([*path, "--help"])
    assert path == ("lm-eval",) or "Usage" in shown.getvalue(), path
    assert "torch" not in sys.modules, path
    seconds[" ".join(path)], before = cpu() - before, cpu()
print(json.dumps(seconds))
"""


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})


def test_help_names_every_command():
    shown = run("--help")
    assert shown.exit_code == 0
    assert all(command in shown.output for command in ("demo", "presets", "bench"))
    for command in ("demo", "presets", "bench"):
        assert run(command, "--help").exit_code == 0


def test_help_needs_no_torch_and_little_time():
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds = json.loads(done.stdout)
    assert {"", "demo", "evaluate", "serve", "convert official", "convert transformer", "lm-eval"} <= seconds.keys()
    assert max(seconds.values()) < 1.5, seconds


def test_the_console_script_is_the_one_whose_help_is_quick():
    from importlib.metadata import distribution

    scripts = {script.name: script.value for script in distribution("ttt-e2e").entry_points}
    assert scripts == {"ttt-e2e": "ttt_e2e_cli.main:app"}
    assert importlib.util.find_spec("ttt_e2e.cli.main").origin == importlib.util.find_spec("ttt_e2e_cli.main").origin


def test_nothing_outside_the_folder_is_imported_by_its_place():
    """`from ..serving` has no meaning in `ttt_e2e_cli`."""
    for path in Path(main.__file__).parent.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert all(node.level < 2 for node in nodes), path


@pytest.mark.parametrize(
    "arguments", [["presets"], ["presets", "125m"], ["train", "--dry-run"], ["reproduce"]], ids=str
)
def test_an_output_that_is_cut_off_ends_a_command_quietly(arguments, capsys):
    with pytest.raises(SystemExit, match="1"), nobody_reads():
        app(arguments)
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_an_error_like_others(capsys, monkeypatch):
    def fail(*arguments):
        raise BrokenPipeError(32, "a worker is gone")

    monkeypatch.setattr("ttt_e2e.loading.find_model", fail)
    refused = run("train", "--dry-run")
    assert refused.exit_code == 2 and "a worker is gone" in refused.output


def test_version():
    assert run("--version").output.startswith("ttt-e2e 0.")


def test_presets_are_listed_and_printed():
    assert all(name in run("presets").output for name in [*preset_names(), *recipe_names()])
    assert yaml.safe_load(run("presets", "125m").output)["hidden_size"] == 768
    assert yaml.safe_load(run("presets", "extend-32k", "--model", "3b").output)["batch_size"] == 64


def test_unknown_preset_is_refused():
    refused = run("presets", "126m")
    assert refused.exit_code == 2 and "126m" in refused.output
    refused = run("presets", "extend-32k", "--model", "4b")
    assert refused.exit_code == 2 and "4b" in refused.output


def test_demo_refuses_a_misspelt_recipe_before_any_work(tmp_path):
    fields = yaml.safe_load(DEMO_RECIPE.read_text())
    fields["experimnt"] = fields.pop("experiment")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(fields))
    refused = run("demo", "--recipe", str(tmp_path / "wrong.yaml"), "--folder", str(tmp_path / "out"))
    assert refused.exit_code == 2 and "experimnt" in refused.output
    assert not (tmp_path / "out").exists()
