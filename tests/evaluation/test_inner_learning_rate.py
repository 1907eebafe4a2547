"""A sweep measures what it says, finds the best inner learning rate, and writes it only where that is safe."""

import dataclasses
import json
import math

import pytest
import torch

from ttt_e2e.data import train_tokenizer
from ttt_e2e.evaluation import inner_learning_rate, load_subject, loss_by_position
from ttt_e2e.evaluation.inner_learning_rate import (
    LEARNING_OFF,
    SWEEP,
    Setting,
    SweepRequest,
    judge,
    measure_sweep,
    prepare_sweep,
    sweep_panels,
    sweep_table,
    write_sweep,
)
from ttt_e2e.evaluation.results import Point
from ttt_e2e.training.checkpoints import complete_checkpoint

from .subjects import learner, mistral

# Every document says one sentence again and again: whoever learns from it gets better at it.
SENTENCES = ("the old machine reads on and on. ", "a letter is written slowly. ", "then it forgets again. ")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES, 300)


@pytest.fixture
def place(tmp_path, tokenizer):
    """A folder with texts, a model and its tokenizer."""
    (tmp_path / "texts").mkdir()
    for number, sentence in enumerate(SENTENCES):
        (tmp_path / "texts" / f"{number}.txt").write_text(20 * sentence)
    torch.manual_seed(0)
    save(tmp_path / "model", learner(vocab_size=300, bos_token_id=0, initializer_range=0.1), tokenizer)
    return tmp_path


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def request(place, **changes) -> SweepRequest:
    arguments = {"model": str(place / "model"), "data": str(place / "texts"), "output": place / "out"}
    arguments |= {"cache": place / "cache", "learning_rates": [1.0, 0.03, 0.3], "length": 40, "batch_size": 3}
    return SweepRequest(**(arguments | changes))


def run(place, **changes):
    sweep = prepare_sweep(request(place, **changes))
    measure_sweep(sweep)
    return sweep, *write_sweep(sweep)


def test_losses_are_those_of_the_model_under_each_setting(place):
    sweep, verdict, _, _ = run(place, mini_batch_sizes=[4, 8])
    points = {point.label: point.numbers["loss"] for point in sweep.results.points}
    rates = [0.03, 0.3, 1.0]
    assert list(points) == [LEARNING_OFF, *(f"{rate:g}, mini-batch {size}" for size in (4, 8) for rate in rates)]
    subject = load_subject(str(place / "model"))
    for point in sweep.results.points:
        rate, size = point.numbers["learning_rate"], point.numbers["mini_batch_size"]
        if rate is not None:
            subject.model.config.inner_learning_rate, subject.model.config.mini_batch_size = rate, size
        losses = loss_by_position(subject, sweep.data.documents, 1, test_time_training=rate is not None)
        assert abs(losses.double().mean().item() - point.numbers["loss"]) < 1e-5
    assert len({round(loss, 4) for loss in points.values()}) == len(points)
    best = min((loss, label) for label, loss in points.items())
    assert (verdict.loss, verdict.best.label) == best and verdict.helps


def test_table_picture_and_verdict_are_written(place):
    _, verdict, table, files = run(place)
    names = {path.name for path in (place / "out").iterdir() if not path.name.startswith(".")}
    assert names == {"results.jsonl", "results.md", "results.png", "results.svg", "best.json"}
    assert {path.name for path in files} == names - {"results.jsonl"}
    assert [row[0] for row in table.rows] == [LEARNING_OFF, "0.03", "0.3", "1"]
    best = json.loads((place / "out" / "best.json").read_text())
    assert best["best"] == {"learning_rate": verdict.best.learning_rate, "mini_batch_size": 4}
    assert best["helps"] and not best["written"]
    assert "minus learning off" in (place / "out" / "results.md").read_text()


def test_a_sweep_goes_on_and_grows(place):
    run(place)
    sweep = prepare_sweep(request(place, learning_rates=[0, 0.03, 0.1, 0.3]))
    assert measure_sweep(sweep) == 1
    assert len(write_sweep(sweep)[1].rows) == 5
    assert measure_sweep(prepare_sweep(request(place))) == 0


def test_the_best_is_written_and_the_sweep_still_belongs_to_the_model(place):
    before = json.loads((place / "model" / "config.json").read_text())
    _, verdict, _, files = run(place, write=True)
    path = place / "model" / "config.json"
    after = json.loads(path.read_text())
    assert files[-1] == path and after == before | {"inner_learning_rate": verdict.best.learning_rate}
    assert measure_sweep(prepare_sweep(request(place))) == 0
    assert load_subject(str(place / "model")).model.config.inner_learning_rate == verdict.best.learning_rate
    with pytest.raises(ValueError, match="of another model"):
        torch.manual_seed(1)
        learner(vocab_size=300, bos_token_id=0).save_pretrained(place / "model")
        prepare_sweep(request(place))


def test_the_folder_of_a_run_stands_for_its_model(place):
    (place / "run").mkdir()
    (place / "model").rename(place / "run" / "model")
    _, verdict, _, files = run(place, model=str(place / "run"), write=True)
    assert files[-1] == place / "run" / "model" / "config.json" and verdict.helps


def test_a_checkpoint_is_measured_but_never_written_to(place):
    complete_checkpoint(place / "model")
    assert run(place)[1].helps
    with pytest.raises(ValueError, match="is a checkpoint of a run, which could not be resumed"):
        prepare_sweep(request(place, write=True))


def test_where_nothing_helps_nothing_is_written(place, monkeypatch):
    """A model that is made worse by every step: its learning is ascent."""

    def worse(subject, data, length, settings):
        rate = subject.model.config.inner_learning_rate if subject.arguments["test_time_training"] else 0
        return torch.tensor([5.0 + rate, 5.0 + 2 * rate, 5.0])[:, None].expand(3, length - 1)

    monkeypatch.setattr(inner_learning_rate, "SWEEP", dataclasses.replace(SWEEP, parts=worse))
    before = (place / "model" / "config.json").read_bytes()
    _, verdict, _, _ = run(place, write=True)
    assert not verdict.helps and "No inner learning rate of the grid helps" in verdict.lines()[0]
    assert (place / "model" / "config.json").read_bytes() == before
    assert not json.loads((place / "out" / "best.json").read_text())["written"]


# ------------------------------------------------------------------------------------------------------------ verdicts


def point(rate: float | None, by_document: list[float] | None, size: int = 4) -> Point:
    setting = Setting() if rate is None else Setting(rate, size)
    loss = None if by_document is None else sum(by_document) / len(by_document)
    numbers = {"loss": loss, "loss_by_document": by_document or [None, None]} | dataclasses.asdict(setting)
    return Point(SWEEP.name, setting.label, "model", 40, {}, numbers, {}, {"model": "", "data": "", "settings": ""})


def test_a_difference_within_the_noise_is_called_so():
    off = point(None, [4.0, 5.0])
    noisy = judge([off, point(0.1, [3.0, 5.9]), point(1.0, [6.0, 6.0])])
    assert noisy.helps and abs(noisy.standard_error - 0.95) < 1e-9
    assert "within the noise" in " ".join(noisy.lines())
    clear = judge([off, point(0.01, [4.0, 5.0]), point(0.1, [3.0, 4.01]), point(1.0, [6.0, 6.0])])
    assert [line for line in clear.lines() if "noise" in line or "grid" in line] == []


def test_the_end_of_the_grid_is_pointed_out():
    off, worse = point(None, [4.0, 5.0]), point(0.1, [3.9, 4.9])
    for rate, name in ((0.01, "lowest"), (1.0, "highest")):
        verdict = judge([off, worse, point(rate, [3.0, 4.0])])
        assert f"It is the {name} of the grid" in " ".join(verdict.lines())
    assert judge([off, worse]).at_the_end is None


def test_a_loss_that_is_not_finite_is_never_the_best():
    points = [point(None, [4.0, 5.0]), point(0.1, [3.0, 4.0]), point(10.0, None)]
    assert judge(points).best == Setting(0.1, 4)
    assert sweep_table(points).rows[-1][2:] == ["not finite", "not finite", ""]
    losses, differences = sweep_panels(points)
    assert all(math.isnan(panel.curves["mini-batch 4"][1][-1]) for panel in (losses, differences))
    for broken in ([points[0], points[2]], [point(None, None), points[1]]):
        with pytest.raises(ValueError, match="its loss is not finite"):
            judge(broken)


def test_a_step_that_is_far_too_large_does_not_hide_the_others():
    points = [point(None, [4.0, 4.0]), point(0.1, [3.9, 3.9]), point(10.0, [30.0, 30.0])]
    curve = sweep_panels(points)[1].curves["mini-batch 4"]
    assert abs(curve[1][0] + 0.1) < 1e-9 and math.isnan(curve[1][1])


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": [0.0]}, "learning_rates: give at least one besides 0"),
        ({"learning_rates": [-1.0]}, r"learning_rates: -1\.0 must be finite and not negative"),
        ({"learning_rates": [math.nan]}, "learning_rates: nan must be finite"),
        ({"mini_batch_sizes": [16]}, r"`mini_batch_size` \(16\) is larger than `sliding_window` \(8\)"),
        ({"mini_batch_sizes": [0]}, "`mini_batch_size` must be at least 1"),
        ({"length": 5}, "length=5: no token would be predicted after an inner step.*at least 6"),
        ({"length": 5000}, "5000 is beyond the data"),
        ({"documents": 0}, "documents=0: must be at least 1"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"model": "tiny"}, "is a preset with random weights"),
    ],
)
def test_mistakes_are_refused_before_any_work(place, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare_sweep(request(place, **changes))
    assert not (place / "out").exists()


def test_models_that_cannot_learn_are_refused(place, tokenizer):
    save(place / "theirs", mistral(vocab_size=300), tokenizer)
    with pytest.raises(ValueError, match="a mistral model has no inner learning rate; make a TTT-E2E model of it"):
        prepare_sweep(request(place, model=str(place / "theirs")))
    save(place / "plain", learner(vocab_size=300, num_suffix_layers=0, test_time_training=False), tokenizer)
    with pytest.raises(ValueError, match="`num_suffix_layers` is 0"):
        prepare_sweep(request(place, model=str(place / "plain")))
    with pytest.raises(ValueError, match="leave the suffix out"):
        prepare_sweep(request(place, model=f"{place / 'model'}@learning-on"))
