"""A training that is killed at any point and resumed ends as if nothing had happened, bit for bit."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from ttt_e2e.data import PackedStream, collate_rows
from ttt_e2e.training import (
    MetaTrainer,
    MetaTrainingArguments,
)
from ttt_e2e.training.checkpoints import checkpoint_bytes, checkpoint_folders, is_complete, last_complete_checkpoint

from ..data.letters import letters_tokenizer
from . import helpers
from .helpers import repeatable, tiny_model
from .processes import run_alone
from .resuming import (
    ARGUMENTS,
    EVERY,
    FILES,
    OPTIONS,
    SAVING,
    STEPS,
    Begun,
    Disk,
    assert_same,
    finish,
    interrupt,
    steps_of,
    trainer_of,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights and logs of uninterrupted runs, one for each of `OPTIONS`."""
    folder, found = tmp_path_factory.mktemp("uninterrupted"), {}

    def of(name):
        if name not in found:
            found[name] = finish(folder / name, None, **OPTIONS[name])
        return found[name]

    return of


# -------------------------------------------------------------------------------------------------- killed in training


@pytest.mark.parametrize(
    ("name", "event", "step", "saved"),
    [
        ("plain", "on_step_begin", 7, 6),
        ("plain", "on_pre_optimizer_step", 8, 6),
        ("accumulation", "on_substep_end", 7, 6),
        ("evaluation", "on_evaluate", 9, 6),
        ("checkpointing", "on_step_begin", 10, 9),
        ("muon", "on_step_begin", 8, 6),
    ],
)
def test_killed_training_resumes_bit_for_bit(tmp_path, uninterrupted, name, event, step, saved):
    folder = tmp_path / "run"
    interrupt(folder, killer=(event, step), **OPTIONS[name])
    assert steps_of(folder)[-1] == saved
    assert_same(finish(folder, True, **OPTIONS[name]), uninterrupted(name))


def test_uninterrupted_log_holds_what_resumption_must_repeat(uninterrupted):
    """Or the comparisons above could be of empty logs."""
    training = [entry for entry in uninterrupted("evaluation")["log"] if "loss" in entry]
    evaluation = [entry for entry in uninterrupted("evaluation")["log"] if "eval_loss" in entry]
    assert [entry["step"] for entry in training] == [entry["step"] for entry in evaluation] == [3, 6, 9, 12]
    wanted = {"loss", "grad_norm", "learning_rate", "inner_grad_norm", *(f"nll_mini_batch_{i}" for i in range(4))}
    assert all(wanted <= entry.keys() for entry in training)
    assert all("eval_loss_learning_off" in entry for entry in evaluation)
    for name in wanted:
        assert len({entry[name] for entry in training}) == len(training), f"{name} does not change with the step"


def test_killed_twice(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    interrupt(folder, killer=("on_step_begin", 5))
    interrupt(folder, killer=("on_step_begin", 11), resume=True)
    assert_same(finish(folder, True), uninterrupted("plain"))


# ---------------------------------------------------------------------------------------------------- killed in saving


@pytest.mark.parametrize("lacking", SAVING)
def test_killed_while_saving(tmp_path, uninterrupted, lacking):
    folder = tmp_path / "run"
    interrupt(folder, saving=(6, lacking), save_total_limit=1)
    assert last_complete_checkpoint(folder) == folder / "checkpoint-3"
    assert {path.name for path in (folder / "checkpoint-3").iterdir()} == FILES
    leftover = folder / "checkpoint-6"
    assert leftover.exists() == (lacking != "anything")
    leftover.mkdir(exist_ok=True)
    (leftover / "leftover.txt").write_text("of the killed process")
    assert_same(finish(folder, True, save_total_limit=2), uninterrupted("plain"))
    assert steps_of(folder) == [9, 12]


def test_leftover_is_replaced_when_its_step_is_saved_again(tmp_path):
    folder = tmp_path / "run"
    interrupt(folder, saving=(6, "the manifest"))
    (folder / "checkpoint-6" / "leftover.txt").write_text("of the killed process")
    finish(folder, True)
    assert {path.name for path in (folder / "checkpoint-6").iterdir()} == FILES
    assert is_complete(folder / "checkpoint-6")


def test_killed_between_the_manifest_and_the_removal_of_older_checkpoints(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    interrupt(folder, killer=("on_save", 6))
    assert steps_of(folder) == [3, 6] and last_complete_checkpoint(folder).name == "checkpoint-6"
    assert_same(finish(folder, True, save_total_limit=1), uninterrupted("plain"))
    assert steps_of(folder) == [STEPS]


def test_killed_in_the_first_checkpoint(tmp_path, uninterrupted):
    """There is nothing to resume from, and nothing to lose: the same command without resumption starts anew."""
    folder = tmp_path / "run"
    interrupt(folder, saving=(EVERY, "the manifest"))
    with pytest.raises(ValueError, match="holds no complete checkpoint: start a new run"):
        trainer_of(folder).train(resume_from_checkpoint=True)
    assert_same(finish(folder, None), uninterrupted("plain"))


class Watch:
    """Looks for a complete checkpoint before every operation on files, once there was one."""

    def __init__(self, folder):
        self.folder, self.seen, self.missing, self.looking = Path(folder), False, [], False

    def __call__(self, event, arguments):
        if self.looking or not event.startswith(("os.", "shutil.", "open")):
            return
        self.looking = True
        complete = last_complete_checkpoint(self.folder) is not None
        self.looking = False
        if self.seen and not complete:
            self.missing.append(event)
        self.seen = self.seen or complete


def train_watched(folder, result):
    watch = Watch(folder)
    sys.addaudithook(watch)
    trainer_of(folder, save_total_limit=1).train()
    result.write_text(json.dumps({"seen": watch.seen, "missing": watch.missing}))


def test_there_is_always_a_complete_checkpoint(tmp_path):
    """Also with `save_total_limit=1`: the older one goes only after the newer one is complete."""
    folder, result = tmp_path / "run", tmp_path / "result"
    assert run_alone(train_watched, folder, result) == 0
    assert json.loads(result.read_text()) == {"seen": True, "missing": []}
    assert steps_of(folder) == [STEPS]


# --------------------------------------------------------------------------------------------------------- disk space


def free(monkeypatch, count):
    """Let every disk have `count()` bytes left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2**50, 0, count()))


def test_too_little_disk_is_refused_before_the_first_step(tmp_path, monkeypatch):
    begun, folder = [], tmp_path / "a" / "run"
    trainer = trainer_of(folder, callbacks=[Begun(begun)])
    needed = checkpoint_bytes(trainer.model)
    free(monkeypatch, lambda: needed - 1)
    with pytest.raises(OSError, match=f"a checkpoint needs {needed} bytes, but its disk has only {needed - 1} left"):
        trainer.train()
    assert not begun and not checkpoint_folders(folder)
    free(monkeypatch, lambda: needed)
    trainer.train()
    assert len(checkpoint_folders(folder)) == STEPS // EVERY


def test_runs_that_save_nothing_need_no_disk(tmp_path, monkeypatch):
    free(monkeypatch, lambda: 0)
    trainer = trainer_of(tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 1


def test_full_disk_in_training_keeps_earlier_checkpoints(tmp_path, monkeypatch, uninterrupted):
    begun, folder = [], tmp_path / "run"
    trainer = trainer_of(folder, callbacks=[Begun(begun)], save_total_limit=1)
    free(monkeypatch, lambda: 0 if 4 in begun else 2**40)
    with pytest.raises(OSError, match="checkpoint-6 needs"):
        trainer.train()
    assert steps_of(folder) == [3] and is_complete(folder / "checkpoint-3")
    monkeypatch.undo()
    assert_same(finish(folder, True), uninterrupted("plain"))


def test_estimate_of_a_checkpoint_is_its_size(tmp_path):
    trainer = trainer_of(tmp_path, {"hidden_size": 128, "intermediate_size": 256}, max_steps=1, save_steps=1,
                         logging_steps=1, warmup_steps=0)  # fmt: skip
    trainer.train()
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    estimate = checkpoint_bytes(trainer.model)
    assert size > 2**22 and size <= estimate <= 1.05 * size + 2**20


@pytest.mark.slow
def test_stream_is_resumed_exactly_over_several_passes(tmp_path):
    """Nine rows in a pass and four in a batch: checkpoint and end lie in different passes, at no border of them."""
    histories = []
    for name, steps in (("whole", 12), ("cut", 6), ("cut", 12)):
        trainer = MetaTrainer(
            tiny_model(vocab_size=64),
            MetaTrainingArguments(
                str(tmp_path / name), **(helpers.ARGUMENTS | ARGUMENTS | {"gradient_accumulation_steps": 2})
            ),
            train_dataset=stream_of_letters(),
            data_collator=collate_rows,
        )
        if steps == 6:
            trainer.add_callback(StopAfter(6))
        trainer.train(resume_from_checkpoint=(name, steps) == ("cut", 12))
        histories.append([entry for entry in repeatable(trainer.state.log_history) if "loss" in entry])
    assert histories[2] == histories[0] and len(histories[0]) == STEPS // EVERY


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **named):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def stream_of_letters():
    texts = ["abcdefgh" * 4, "hgfedcba" * 6, "aabbccdd" * 9]
    documents = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    return PackedStream(documents, letters_tokenizer(), 4 * helpers.MINI_BATCH)
