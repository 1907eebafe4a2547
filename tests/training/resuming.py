"""Runs that are interrupted and go on: trainers, ways to die, and what a run leaves behind."""

import os
from collections import namedtuple
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from ttt_e2e.training import (
    safe_trainer,
)
from ttt_e2e.training.checkpoints import checkpoint_folders

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
    "muon": {"optimizer": "muon", "muon_learning_rate": 0.05, "muon_excludes": ["prime_mlp"]},
}


class Begun(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, **named):
        self.steps.append(state.global_step)
