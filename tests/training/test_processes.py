"""Two processes train what one process trains: DDP, on CPU with gloo.

One pair of processes goes through all cases and stores what it found; each test compares one case with the same
training in this process, which is not distributed.
"""

import pytest
import torch
from transformers import TrainerCallback

from . import helpers
from .helpers import random_rows, repeatable
from .processes import KILLED, WORLD, kill_self, run_together
from .two_processes import (
    ACCUMULATION,
    DOUBLE,
    TRAINING,
    assert_alike,
    model_of,
    rows_with_few_labels,
    store,
    stored,
    train_case,
)

DDP = {
    "float32": {},
    "float64": DOUBLE,
    "checkpointing": DOUBLE | {"activation_checkpointing": True},
    "accumulation": ACCUMULATION,
    "few-labels": DOUBLE | {"few_labels": True},
    "few-labels-accumulation": ACCUMULATION | {"few_labels": True},
    "first-order": DOUBLE | {"meta_gradient": "first_order"},
    # Six rows, four in a batch: an epoch ends within one, and what is left is dropped.
    "several-epochs": DOUBLE | {"row_count": 6},
    "muon": DOUBLE | {"optimizer": "muon", "muon_learning_rate": 1e-3},
}


def ddp_worker(folder):
    for name, options in DDP.items():
        store(folder, name, train_case, folder, WORLD, **options)
    store(folder, "evaluation", evaluation_case, folder)


def evaluation_case(folder):
    """Metrics on seven rows, two at once in each process, of unequal numbers of labels."""
    rows = rows_with_few_labels().select(range(7))
    metrics = helpers.meta_trainer(
        folder, model_of(torch.float64), evaluation=rows, per_device_eval_batch_size=2
    ).evaluate()
    return {name: value for name, value in metrics.items() if name.startswith("eval_loss")}


@pytest.fixture(scope="module")
def ddp_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_together(ddp_worker, folder)
    return folder


@pytest.mark.parametrize("name", DDP)
def test_ddp_trains_what_one_process_trains(tmp_path, ddp_folder, name):
    expected = train_case(tmp_path, 1, **DDP[name])
    assert (expected["world"], expected["wrapped"]) == (1, "TTTE2EForCausalLM")
    for own in stored(ddp_folder, name):
        assert (own["world"], own["wrapped"]) == (WORLD, "DistributedDataParallel")
        assert_alike(own, expected, DDP[name].get("dtype", torch.float32))


SAVING = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2}


class Killer(TrainerCallback):
    def on_step_begin(self, args, state, control, **named):
        if state.global_step == 3:
            kill_self()


def saving_worker(folder, name, killed, resume):
    arguments = TRAINING | SAVING | {"per_device_train_batch_size": 2}
    callbacks = [Killer()] if killed else None
    trainer = helpers.meta_trainer(folder / name, model_of(), random_rows(), callbacks=callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    log = [entry for entry in repeatable(trainer.state.log_history) if "loss" in entry]
    store(folder, name, lambda: {"log": log, "weights": trainer.model.state_dict()})


def test_ddp_resumes_bit_for_bit(tmp_path):
    run_together(saving_worker, tmp_path, "whole", False, None)
    with pytest.raises(RuntimeError, match=rf"exit codes \[{KILLED}, {KILLED}\]"):
        run_together(saving_worker, tmp_path, "killed", True, None)
    files = {path.name for path in (tmp_path / "killed" / "checkpoint-2").iterdir()}
    assert {"complete.json", "rng_state_0.pth", "rng_state_1.pth"} <= files
    run_together(saving_worker, tmp_path, "killed", False, True)
    for own, expected in zip(stored(tmp_path, "killed"), stored(tmp_path, "whole"), strict=True):
        assert own["log"] == expected["log"] and [entry["step"] for entry in own["log"]] == [2, 4]
        assert all(torch.equal(weight, expected["weights"][name]) for name, weight in own["weights"].items())


def test_evaluation_counts_every_row_once(ddp_folder):
    """Also where the last batch is not full, and processes are given rows twice to fill it."""
    model, rows = model_of(torch.float64).eval(), rows_with_few_labels().select(range(7))
    ids, labels = torch.tensor(rows["input_ids"]), torch.tensor(rows["labels"])
    with torch.no_grad():
        expected = {
            "eval_loss": model(ids, labels=labels).loss.item(),
            "eval_loss_learning_off": model(ids, labels=labels, test_time_training=False).loss.item(),
        }
    for found in stored(ddp_folder, "evaluation"):
        assert found == pytest.approx(expected, rel=1e-9)
