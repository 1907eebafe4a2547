"""Each command teaches, and refuses mistakes before any work."""

import yaml
from typer.testing import CliRunner

from ttt_e2e.cli.main import app
from ttt_e2e.configuration import preset_names, recipe_names
from ttt_e2e.configuration.demo_recipe import DEMO_RECIPE


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})


def test_help_names_every_command():
    shown = run("--help")
    assert shown.exit_code == 0
    assert all(command in shown.output for command in ("demo", "presets", "bench"))
    for command in ("demo", "presets", "bench"):
        assert run(command, "--help").exit_code == 0


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
    fields["data"]["validation_evry"] = fields["data"].pop("validation_every")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(fields))
    refused = run("demo", "--recipe", str(tmp_path / "wrong.yaml"), "--folder", str(tmp_path / "out"))
    assert refused.exit_code == 2 and "validation_evry" in refused.output
    assert not (tmp_path / "out").exists()
