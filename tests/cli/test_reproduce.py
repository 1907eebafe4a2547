"""An experiment from its file to a verdict, at a size of seconds."""

import random
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from ttt_e2e.cli import reproduce_steps
from ttt_e2e.cli.main import app
from ttt_e2e.cli.reproduce_steps import measured_number, run_experiment, verdict, write_held_out
from ttt_e2e.configuration.experiments import Number, experiment_names, load_experiment
from ttt_e2e.evaluation.results import Point

SHORT = ["batch_size=2", "data.sequence_length=128", "data.validation_rows=2", "training.max_steps=2"]
SHORT += ["training.logging_steps=1", "training.save_steps=2", "training.eval_strategy=no"]


@pytest.fixture
def experiment(tmp_path):
    choose = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(12):
        words = ("".join(choose.choices("abcdefghij", k=5)) for _ in range(400))
        (tmp_path / "texts" / f"{number:02}.txt").write_text(" ".join(words))
    row = {"overrides": SHORT}
    fields = {
        "paper": "Nothing at this size.",
        "size": "tiny",
        "recipes": ["pretrain-tiny"],
        "data": str(tmp_path / "texts"),
        "validation_every": 4,
        "rows": {
            "TTT-E2E": {"system": "ttt-e2e", **row},
            "sliding window": {"system": "sliding-window", **row},
            "off": {"system": "ttt-e2e", "of": "TTT-E2E", "evaluation": {"test_time_training": False}},
        },
        "baseline": "sliding window",
        "measured": [{"task": "loss-by-position", "lengths": [192], "documents": 3}],
        "claims": [
            {
                "text": "learning changes something",
                "smaller": {"row": "TTT-E2E", "length": 192, "name": "loss"},
                "larger": {"row": "off", "length": 192, "name": "loss"},
            }
        ],
    }
    path = tmp_path / "mine.yaml"
    path.write_text("# Mine\n" + yaml.safe_dump(fields))
    return load_experiment(str(path))


def test_experiment_is_trained_measured_and_judged_once(tmp_path, experiment, monkeypatch):
    output, cache = tmp_path / "out", tmp_path / "cache"
    models = tmp_path / "models"
    verdicts = run_experiment(experiment, output, models, cache, Console(quiet=True))
    assert [text for text, _ in verdicts] == ["learning changes something"]
    report = (output / "report.md").read_text()
    assert "Nothing at this size." in report and ("| yes |" in report) == verdicts[0][1]
    assert (output / "0-loss-by-position" / "results.png").is_file()
    # What is there is kept: nothing is trained or measured again.
    monkeypatch.setattr(reproduce_steps, "prepare_run", None)
    lines = (output / "0-loss-by-position" / "results.jsonl").read_text()
    assert run_experiment(experiment, output, models, cache, Console(quiet=True)) == verdicts
    assert (output / "0-loss-by-position" / "results.jsonl").read_text() == lines
    # Another experiment takes the models that it would train alike, and only those.
    assert run_experiment(experiment, tmp_path / "other", models, cache, Console(quiet=True)) == verdicts
    experiment.rows["TTT-E2E"].overrides.append("training.seed=1")
    with pytest.raises(TypeError, match="NoneType"):
        run_experiment(experiment, tmp_path / "third", models, cache, Console(quiet=True))


def test_training_only_documents_are_never_measured(tmp_path, experiment):
    tables = Path(experiment.data) / "tables"
    tables.mkdir()
    for number in range(12):
        (tables / f"{number:02}.txt").write_text(f"table {number} " * 300)
    held_out = write_held_out(experiment, tmp_path / "all", tmp_path / "cache").read_text()
    assert "table" in held_out
    experiment.training_only = ["tables"]
    held_out = write_held_out(experiment, tmp_path / "some", tmp_path / "cache").read_text()
    assert held_out and "table" not in held_out


def test_verdict_is_the_order_of_the_numbers():
    points = [
        Point("task", label, "spec", 8, {}, {"loss": loss, "losses": [loss, 2 * loss, 30.0]}, {}, {})
        for label, loss in (("a", 1.0), ("b", 2.0))
    ]
    a, b = Number("a", 8, "loss"), Number("b", 8, "loss")
    assert verdict(a, b, points) == (True, "a 1.000, b 2.000")
    assert not verdict(b, a, points)[0] and not verdict(a, a, points)[0]
    assert measured_number(Number("b", 8, "losses", first=0, end=2), points) == 3.0
    points[1].numbers["loss"] = 67371008
    assert verdict(a, b, points) == (True, "a 1.000, b 67,371,008")


def test_experiments_are_listed_and_mistakes_refused():
    shown = CliRunner().invoke(app, ["reproduce"])
    assert shown.exit_code == 0 and all(name in shown.output for name in experiment_names())
    refused = CliRunner().invoke(app, ["reproduce", "tokn-position"])
    assert refused.exit_code == 2 and "token-position" in refused.output
