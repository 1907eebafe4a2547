"""A training that is killed at any point and resumed ends as if nothing had happened, bit for bit."""

import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ttt_e2e.data import PackedStream, collate_rows
from ttt_e2e.training import (
    MetaTrainer,
    MetaTrainingArguments,
    checkpoints,
    safe_trainer,
)
from ttt_e2e.training.checkpoints import checkpoint_bytes, checkpoint_folders, is_complete, last_complete_checkpoint

from ..data.letters import letters_tokenizer
from . import helpers
from .helpers import random_rows, repeatable, tiny_model
from .processes import KILLED, kill_self, run_alone

STEPS, EVERY = 12, 3  # a checkpoint and a log every three steps
ARGUMENTS = {"max_steps": STEPS, "logging_steps": EVERY, "save_strategy": "steps", "save_steps": EVERY}
FIELDS = {"inner_learning_rate": 0.5}
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "complete.json",
}
# Each names what the checkpoint still lacks when the process dies.
SAVING = {
    "anything": (Trainer, "save_model"),
    "the optimizer": (Trainer, "_save_optimizer_and_scheduler"),
    "half of the optimizer": (torch, "save"),
    "the random state": (Trainer, "_save_rng_state"),
    "the manifest": (safe_trainer, "complete_checkpoint"),
    "the name of the manifest": (os, "replace"),
}
Disk = namedtuple("Disk", ["total", "used", "free"])


def trainer_of(folder, fields=None, evaluation=False, callbacks=None, **arguments):
    """All that a training consists of: shuffled rows, two epochs, an inner warm-up that goes on beyond the middle."""
    warmup = {"inner_lr_init": 0.1, "inner_lr_warmup_steps": 9}
    return helpers.meta_trainer(
        folder,
        tiny_model(**(FIELDS | (fields or {}))),
        random_rows(),
        evaluation=random_rows(4, seed=1) if evaluation else None,
        callbacks=callbacks,
        **(ARGUMENTS | warmup | arguments),
    )


class Killer(TrainerCallback):
    """Kills the process at an event of the given step, counted by the optimizer steps that are done."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.kill)

    def kill(self, args, state, control, **named):
        if state.global_step == self.step:
            kill_self()


def kill_in_saving(step, lacking):
    """Let the process die within the saving of `step`'s checkpoint."""
    owner, name = SAVING[lacking]
    original = getattr(owner, name)

    def dying(*arguments, **named):
        if any(f"checkpoint-{step}" in str(argument) for argument in arguments):
            if lacking == "half of the optimizer":
                original(*arguments, **named)
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            kill_self()
        return original(*arguments, **named)

    setattr(owner, name, dying)


def train_in_child(folder, result, resume, options, killer=None, saving=None):
    if saving is not None:
        kill_in_saving(*saving)
    trainer = trainer_of(folder, callbacks=[Killer(*killer)] if killer else None, **options)
    trainer.train(resume_from_checkpoint=resume)
    torch.save({"weights": trainer.model.state_dict(), "log": log_of(trainer)}, result)


def log_of(trainer):
    """The whole log, but for times, and for the mean loss of what one process trained."""
    entries = [entry for entry in repeatable(trainer.state.log_history) if "train_loss" not in entry]
    times = ("_runtime", "_per_second")
    return [{name: value for name, value in entry.items() if not name.endswith(times)} for entry in entries]


def finish(folder, resume, **options):
    """Weights and log of a training that runs to its end in a process of its own."""
    result = Path(f"{folder}.result")
    assert run_alone(train_in_child, folder, result, resume, options) == 0
    return torch.load(result)


def interrupt(folder, killer=None, saving=None, resume=None, **options):
    result = Path(f"{folder}.result")
    assert run_alone(train_in_child, folder, result, resume, options, killer, saving) == KILLED
    assert not result.exists()


def assert_same(one, other):
    assert one["log"] == other["log"]
    assert one["weights"].keys() == other["weights"].keys()
    different = [name for name, weight in one["weights"].items() if not torch.equal(weight, other["weights"][name])]
    assert not different


def steps_of(folder):
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoint_folders(folder)]


def contents(folder):
    """Bytes and time of change of every file, and the names of all folders."""
    return {
        str(path): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "evaluation": {"evaluation": True, "eval_strategy": "steps", "eval_steps": EVERY},
    "checkpointing": {"activation_checkpointing": True},
}


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


# ------------------------------------------------------------------------------------- damaged and foreign checkpoints


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """The folder of a run of six steps with two checkpoints, and its weights."""
    folder = tmp_path_factory.mktemp("six") / "run"
    trainer = trainer_of(folder, max_steps=6)
    trainer.train()
    return folder, {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.fixture
def run_folder(six_steps, tmp_path):
    return shutil.copytree(six_steps[0], tmp_path / "run")


def truncate(name):
    return lambda folder: os.truncate(folder / name, os.path.getsize(folder / name) - 1)


def remove(name):
    return lambda folder: (folder / name).unlink()


def flip(name):
    """One bit in the middle of a file is another one."""

    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def manifest(content):
    return lambda folder: (folder / "complete.json").write_bytes(content)


DAMAGE = {
    "weights cut off": truncate("model.safetensors"),
    "one bit of the weights": flip("model.safetensors"),
    "one bit of the optimizer": flip("optimizer.pt"),
    "one bit of the manifest": flip("complete.json"),
    "optimizer cut off": truncate("optimizer.pt"),
    "optimizer gone": remove("optimizer.pt"),
    "random state gone": remove("rng_state.pth"),
    "state gone": remove("trainer_state.json"),
    "manifest gone": remove("complete.json"),
    "manifest empty": manifest(b""),
    "manifest of zeros": manifest(bytes(100)),
    "manifest of no text": manifest(b"\xff\xfe\x00garbage"),
    "manifest without files": manifest(b'{"files": {}}'),
    "manifest a list": manifest(b'["model.safetensors"]'),
    "manifest with a list": manifest(b'{"files": ["model.safetensors"]}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_not_used(run_folder, six_steps, damage):
    DAMAGE[damage](run_folder / "checkpoint-6")
    with pytest.raises(ValueError, match=r"the checkpoint is incomplete or damaged \(.*\); give an earlier one"):
        trainer_of(run_folder, max_steps=6).train(resume_from_checkpoint=str(run_folder / "checkpoint-6"))
    begun = []
    trainer = trainer_of(run_folder, max_steps=6, callbacks=[Begun(begun)])
    trainer.train(resume_from_checkpoint=True)
    assert begun == [3, 4, 5]
    assert all(torch.equal(weight, six_steps[1][name]) for name, weight in trainer.model.state_dict().items())
    assert is_complete(run_folder / "checkpoint-6")


class Begun(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, **named):
        self.steps.append(state.global_step)


def test_no_complete_checkpoint_at_all(run_folder):
    for step in (3, 6):
        DAMAGE["weights cut off"](run_folder / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer_of(run_folder).train(resume_from_checkpoint=True)


def test_earlier_checkpoint_by_path(run_folder, six_steps):
    trainer = trainer_of(run_folder, max_steps=6)
    trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-3"))
    assert all(torch.equal(weight, six_steps[1][name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 32, "head_dim": 8}, "its hidden_size is 16, but this model's is 32"),
        ({"num_suffix_layers": 1}, "its num_suffix_layers is 2, but this model's is 1"),
        ({"inner_learning_rate": 0.25}, "its inner_learning_rate is 0.5, but this model's is 0.25"),
        ({"sliding_window": 12}, "its sliding_window is 8, but this model's is 12"),
        ({"mini_batch_size": 8}, "its mini_batch_size is 4, but this model's is 8"),
        ({"meta_gradient": "first_order"}, "its meta_gradient is second_order"),
        ({"test_time_training": False}, "its test_time_training is True"),
    ],
)
@pytest.mark.parametrize("asked", [True, "checkpoint-6"])
def test_checkpoint_of_another_model_is_refused(run_folder, fields, message, asked):
    trainer, before = trainer_of(run_folder, fields), contents(run_folder)
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=asked if asked is True else str(run_folder / asked))
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.model.state_dict().items())
    assert contents(run_folder) == before


@pytest.mark.parametrize("fields", [{"inner_checkpoint_every": 2}, {"inner_checkpoint_offload": True}])
def test_memory_settings_may_change_on_resumption(run_folder, fields):
    trainer = trainer_of(run_folder, fields, max_steps=7, activation_checkpointing=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7


def test_weights_of_other_shapes_are_refused(run_folder):
    """Without a config.json the weights themselves tell."""
    for step in (3, 6):
        folder = run_folder / f"checkpoint-{step}"
        (folder / "config.json").unlink()
        checkpoints.complete_checkpoint(folder)
    with pytest.raises(ValueError, match=r"its shape of model\.\S+ is \(\d+.*\), but this model's is \("):
        trainer_of(run_folder, {"hidden_size": 32}).train(resume_from_checkpoint=True)


def test_another_runs_folder_is_refused_and_left_as_it_is(run_folder):
    before = contents(run_folder)
    with pytest.raises(ValueError, match=r"holds checkpoint-6 of another run.*Nothing was overwritten"):
        trainer_of(run_folder).train()
    assert contents(run_folder) == before


def test_checkpoint_from_elsewhere_does_not_overwrite_another_run(run_folder, tmp_path):
    """A run that resumes from a folder of its own must not write into the folder of a third one."""
    own = shutil.copytree(run_folder, tmp_path / "own")
    before = contents(run_folder)
    with pytest.raises(ValueError, match="another run"):
        trainer_of(run_folder).train(resume_from_checkpoint=str(own / "checkpoint-3"))
    assert contents(run_folder) == before


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


# --------------------------------------------------------------------------------------------- finished, and half saved


def test_finished_run_is_loaded_and_not_trained_further(run_folder, six_steps):
    before, trainer = contents(run_folder), trainer_of(run_folder, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert all(torch.equal(weight, six_steps[1][name]) for name, weight in trainer.model.state_dict().items())
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6]
    assert contents(run_folder) == before


def test_checkpoint_without_its_optimizer_is_not_resumed(tmp_path):
    """It would go on with a fresh one and a schedule from the beginning."""
    trainer_of(tmp_path, max_steps=3, save_only_model=True).train()
    with pytest.raises(ValueError, match="saved without its optimizer"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


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
