"""An experiment from its file to a verdict, at a size of seconds."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from ttt_e2e.cli import experiment_training, tune_outer_steps
from ttt_e2e.cli.main import app
from ttt_e2e.cli.reproduce_steps import run_experiment, write_held_out
from ttt_e2e.cli.tune_outer_steps import FURTHER, Tried, next_factor, tune_outer
from ttt_e2e.configuration import load_recipe
from ttt_e2e.configuration.experiments import experiment_names, load_experiment
from ttt_e2e.evaluation.verdicts import AGREES, DISAGREES, NOT_JUDGED, NOT_RESOLVED
from ttt_e2e.storage.machine import processor
from ttt_e2e.training.run import LOG, MODEL

SHORT = ["batch_size=2", "data.sequence_length=128", "data.validation_rows=2", "training.max_steps=2"]
SHORT += ["training.logging_steps=1", "training.save_steps=2", "training.eval_strategy=no"]
SYSTEMS = ("full-attention", "sliding-window", "static-twin", "ttt-e2e")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, twelve packages of one document each."""
    folder, choose = tmp_path_factory.mktemp("experiment"), random.Random(0)
    for number in range(12):
        words = ("".join(choose.choices("abcdefghij", k=5)) for _ in range(400))
        path = folder / "texts" / f"{number:02}" / "all.txt"
        path.parent.mkdir(parents=True)
        path.write_text(" ".join(words))
    return folder


def experiment_of(place):
    fields = {
        "base": "_tiny",
        "paper": "Nothing at this size.",
        "recipes": ["pretrain-tiny"],
        "data": str(place / "texts"),
        "validation_every": 4,
        "by_recipe": {"pretrain-tiny": dict.fromkeys(SYSTEMS, SHORT)},
        "rows": {"TTT-E2E": {"seeds": 2}},
        "baseline": "sliding window",
        "measured": [{"task": "loss-by-position", "lengths": [192], "documents": 3}],
        "claims": [
            {
                "text": "learning changes something",
                "smaller": {"row": "TTT-E2E", "length": 192, "name": "loss"},
                "larger": {"row": "TTT-E2E, learning off", "length": 192, "name": "loss"},
            }
        ],
    }
    path = place / "mine.yaml"
    path.write_text("# Mine\n" + yaml.safe_dump(fields))
    return load_experiment(str(path))


@pytest.fixture
def experiment(place):
    return experiment_of(place)


def run(experiment, place, output="out", models="models", processes=1):
    where = (place / output, place / models, place / "cache")
    return run_experiment(experiment, *where, Console(quiet=True), processes=processes)


@pytest.fixture(scope="module")
def ran(place):
    """What a run of it, in this process, has found."""
    return run(experiment_of(place), place)


def test_experiment_is_trained_measured_and_judged_once(place, experiment, ran, monkeypatch):
    output = place / "out"
    assert [verdict.claim for verdict in ran.verdicts] == ["learning changes something"]
    assert ran.verdicts[0].answer in (AGREES, DISAGREES, NOT_RESOLVED, NOT_JUDGED)
    report = (output / "report.md").read_text()
    assert "Nothing at this size." in report and ran.verdicts[0].answer in report
    assert (output / "0-loss-by-position" / "results.png").is_file()
    # What is there is kept: nothing is trained or measured again.
    monkeypatch.setattr(experiment_training, "prepare_run", None)
    lines = (output / "0-loss-by-position" / "results.jsonl").read_text()
    assert run(experiment, place).verdicts == ran.verdicts
    assert (output / "0-loss-by-position" / "results.jsonl").read_text() == lines
    # Another experiment takes the models that it would train alike, and only those.
    assert run(experiment, place, "other").verdicts == ran.verdicts
    experiment.rows["TTT-E2E"].overrides.append("training.seed=7")
    with pytest.raises(TypeError, match="NoneType"):
        run(experiment, place, "third")


def test_a_table_has_yardsticks_tokens_and_seconds(experiment, ran):
    report = ran.report
    table = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in report.splitlines() if line.startswith("|")}
    assert table[""][:2] == [" training tokens ", " CPU seconds "]
    for row in experiment.rows:
        tokens, seconds, loss, bits, mark = (cell.strip() for cell in table[row])
        assert tokens == "512" and float(seconds) > 0 and float(bits) > 0
        assert ("±" in loss) == row.startswith("TTT-E2E")  # the only rows with several seeds
        assert "3-gram" in mark or mark == "**not trained**"
    for yardstick in ("3-gram", "5-gram", "gzip", "zstd"):
        tokens, seconds, loss, bits, mark = (cell.strip() for cell in table[yardstick])
        assert (tokens, seconds, mark) == ("", "", "") and float(loss) > 0 and float(bits) > 0
    # Bits per byte are one factor away from nats per token, the same for all.
    numbers = [table[row][2:4] for row in (*experiment.rows, "3-gram", "gzip")]
    factors = [float(bits) / float(loss.split("±")[0]) for loss, bits in numbers]
    assert factors == pytest.approx([factors[0]] * len(factors), rel=0.01)
    assert "better than static twin by" in report or "is better than TTT-E2E, learning off by" in report


@pytest.mark.slow
def test_two_processes_train_what_one_does(place, experiment, ran):
    two = run(experiment, place, "out2", "models2", processes=2)
    folders = [{Path(model).parent.name for row in each.rows.values() for model in row.models} for each in (ran, two)]
    assert folders[0] == folders[1] and len(folders[0]) == 5
    losses = [{(point.label, point.length): point.numbers["loss"] for point in each.points} for each in (ran, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # other numbers of threads add up in other orders
    assert "train_loss" in (place / "models2" / "training.log").read_text()
    assert all(row.cpu_seconds > 0 and row.processors == {processor()} for row in two.rows.values())


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_is_told(place, experiment):
    experiment.by_recipe["pretrain-tiny"]["static-twin"] = [*SHORT, "training.adam_beta1=2"]
    with pytest.raises(ValueError, match="adam_beta1=2: must be at least 0 and below 1"):
        run(experiment, place, "out3", "models3", processes=2)


def test_seeds_are_trainings_of_their_own(ran):
    losses = {point.label: point.numbers["loss"] for point in ran.points}
    assert losses["TTT-E2E"] != losses["TTT-E2E, seed 1"]
    assert "sliding window, seed 1" not in losses


@pytest.mark.slow
def test_rates_are_tried_and_the_best_is_named(tmp_path, experiment):
    where = (tmp_path / "tuning", tmp_path / "models", tmp_path / "cache")
    best = tune_outer(experiment, "pretrain-tiny", [0.5, 2.0], 0.5, *where, Console(quiet=True))
    assert list(best) == ["full-attention", "sliding-window", "static-twin", "ttt-e2e"]
    tried = json.loads((tmp_path / "tuning" / "tuning.json").read_text())
    assert {each["factor"] for each in tried} >= {0.5, 2.0} and len(tried) <= 4 * (2 + FURTHER)
    for system, overrides in best.items():
        losses = {each["rates"]["learning_rate"]: each["loss"] for each in tried if each["system"] == system}
        assert set(losses) >= {0.0015, 0.006}  # half and twice the recipe's
        rate = min(losses, key=losses.get)
        assert overrides == [f"training.learning_rate={rate:g}", f"training.muon_learning_rate={rate / 0.3:g}"]
    assert "by_recipe:\n  pretrain-tiny:" in (tmp_path / "tuning" / "tuning.md").read_text()
    # Nothing is trained twice.
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*.safetensors")}
    assert tune_outer(experiment, "pretrain-tiny", [0.5, 2.0], 0.5, *where, Console(quiet=True)) == best
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*.safetensors")}


def test_a_best_rate_at_the_edge_is_followed():
    def tried(losses):
        return [Tried("ours", factor, {}, 1, loss) for factor, loss in losses.items()]

    assert next_factor([], [1, 2]) == 1 and next_factor(tried({1: 3.0}), [1, 2]) == 2
    assert next_factor(tried({1: 3.0, 2: 2.0}), [1, 2]) == 4
    assert next_factor(tried({1: 2.0, 2: 3.0}), [1, 2]) == 0.5
    assert next_factor(tried({1: 3.0, 2: 2.0, 4: 2.5}), [1, 2]) is None, "the best is inside"
    assert next_factor(tried({1: 4.0, 2: 3.0, 4: 2.0}), [1, 2]) == 8
    assert next_factor(tried({1: 4.0, 2: 3.0, 4: 2.0, 8: 1.0}), [1, 2]) is None, "it runs away"
    assert next_factor(tried({1: 4.0}), [1]) is None


def test_training_only_documents_are_never_measured(tmp_path, experiment):
    shutil.copytree(experiment.data, tmp_path / "texts")
    experiment.data = str(tmp_path / "texts")
    for number in range(12):
        path = Path(experiment.data) / "tables" / f"{number:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"table {number} " * 300)
    experiment.whole_folders = False
    held_out = write_held_out(experiment, tmp_path / "all", tmp_path / "cache").read_text()
    assert "table" in held_out
    experiment.training_only = ["tables"]
    held_out = write_held_out(experiment, tmp_path / "some", tmp_path / "cache").read_text()
    assert held_out and "table" not in held_out


def test_experiments_are_listed_and_mistakes_refused():
    shown = CliRunner().invoke(app, ["reproduce"])
    assert shown.exit_code == 0 and all(name in shown.output for name in experiment_names())
    refused = CliRunner().invoke(app, ["reproduce", "tokn-position"])
    assert refused.exit_code == 2 and "token-position" in refused.output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["tune-outer", "token-positoin"], "token-position"),
        (["tune-outer", "latency"], "trains nothing"),
        (["tune-outer", "token-position", "--recipe", "extend-32k"], "--recipe extend-32k"),
        (["tune-outer", "token-position", "--factors", "0,1"], "must be above 0"),
    ],
)
def test_refused_tuning(command, message):
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and message in refused.output


def test_what_is_a_rows_own_is_in_the_first_recipe_but_for_the_seed():
    """An extension to longer text is the same for all rows of a system: what it goes on from differs already."""
    experiment = load_experiment("context-length-extended")
    rate = {"extend-packages": {"ttt-e2e": ["training.learning_rate=0.5"]}}
    experiment = dataclasses.replace(experiment, by_recipe=experiment.by_recipe | rate)
    row = dataclasses.replace(experiment.rows["TTT-E2E"], overrides=["training.adam_beta1=0.8"])
    first, further = experiment_training.row_recipes(experiment, row, "tiny", seed=2)
    assert first.training["max_steps"] == 4500 and first.training["adam_beta1"] == 0.8
    assert first.training["learning_rate"] == 0.006 and first.training["seed"] == further.training["seed"] == 2
    plain = load_recipe("extend-packages", "tiny")
    assert further.training == plain.training | {"seed": 2, "learning_rate": 0.5} and further.model == plain.model


def test_a_system_may_have_recipes_of_its_own_and_reads_as_many_tokens(tmp_path):
    experiment = load_experiment("context-length-extended")
    read = {}
    for label, row in experiment.rows.items():
        runs = list(experiment_training.row_runs(experiment, row, 0, tmp_path))
        read[label] = sum(recipe.training["max_steps"] * recipe.data.sequence_length for recipe, _ in runs)
        if label == "full attention":
            names, kinds = zip(*((recipe.name, recipe.model.get("layer_types")) for recipe, _ in runs), strict=True)
            assert names == ("pretrain-packages", "widen-packages", "extend-packages")
            assert kinds == (["sliding_attention"] * 4, ["full_attention"] * 4, None)
    longer = {label for label in read if label.endswith("equal time")}
    assert {read[label] for label in read.keys() - longer} == {read["TTT-E2E"]}
    assert min(read[label] for label in longer) > read["TTT-E2E"]


def test_the_rates_of_a_further_recipe_are_tried_on_what_those_before_it_train(tmp_path, monkeypatch):
    trained = []

    def train(experiment, model, recipe, run, cache):
        trained.append((model, recipe, run))
        run.mkdir(parents=True, exist_ok=True)
        (run / LOG).write_text(json.dumps([{"step": 10, "eval_loss": recipe.training["learning_rate"]}]))

    monkeypatch.setattr(tune_outer_steps, "train_recipe", train)
    experiment = load_experiment("context-length-extended")
    rates = {"extend-packages": {"ttt-e2e": ["training.learning_rate=0.5", "training.adam_beta1=0.8"]}}
    experiment = dataclasses.replace(experiment, by_recipe=experiment.by_recipe | rates)
    asked = (experiment, experiment.rows["TTT-E2E"], "extend-packages", 2.0, 0.5, tmp_path, tmp_path)
    tried = tune_outer_steps.try_rate(*asked)
    (model, first, run), (further_model, further, _) = trained
    assert (model, further_model) == ("tiny", str(run / MODEL))
    assert first.training["max_steps"] == 2250 and first.training["learning_rate"] == 0.006
    assert further.training["max_steps"] == 30 and further.training["adam_beta1"] == 0.8
    assert further.training["learning_rate"] == tried.loss == 0.002  # twice the recipe's
    assert first.data.tuning and further.data.tuning
    assert tried.tokens == 10 * (1024 + 8192)


def test_what_a_finished_model_went_on_from_is_needed_no_more(tmp_path, monkeypatch):
    """But for its log, which says what its training took."""
    trained = []

    def train(experiment, model, recipe, run, cache):
        trained.append((recipe.name, model))
        (run / MODEL).mkdir(parents=True)
        (run / LOG).write_text(json.dumps([{"step": 10, "cpu_seconds": 1.5}]))

    monkeypatch.setattr(experiment_training, "train_recipe", train)
    experiment = load_experiment("context-length-extended")
    asked = (experiment, experiment.rows["TTT-E2E"], 0, tmp_path, tmp_path)
    done = experiment_training.train_seed(*asked)
    (_, first), (_, further) = experiment_training.row_runs(*asked[:2], 0, tmp_path)
    assert trained == [("pretrain-packages", "tiny"), ("extend-packages", str(first / MODEL))]
    model, taken = done
    assert (model, taken.tokens, taken.cpu_seconds) == (str(further / MODEL), 10 * (1024 + 8192), 3.0)
    shutil.rmtree(first / MODEL)
    assert experiment_training.train_seed(*asked) == done and len(trained) == 2
    assert experiment_training._steps_to_do(*asked[:2], 0, tmp_path) == 0
    shutil.rmtree(further)
    experiment_training.train_seed(*asked)
    assert len(trained) == 4
