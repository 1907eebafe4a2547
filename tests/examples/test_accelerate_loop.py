"""The example of a plain Accelerate loop trains as MetaTrainer does."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from ..scripts import load_script
from ..training.helpers import meta_trainer, random_rows, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"
SETTINGS = {"learning_rate": 0.01, "inner_lr_init": 0.2, "inner_lr_warmup_steps": 4}
STEPS, ROWS = 10, random_rows(count=8).with_format("torch")  # two rows per step: more than two epochs


@pytest.fixture(scope="module")
def example():
    return load_script(EXAMPLE)


def losses_of_meta_trainer(folder, model, **arguments):
    trainer = meta_trainer(folder, model, ROWS, max_steps=STEPS, logging_steps=1, **SETTINGS, **arguments)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(autouse=True)
def forget_the_precision_of_the_test_before():
    AcceleratorState._reset_state(reset_partial_state=True)


def test_loop_gives_the_losses_of_meta_trainer(tmp_path, example):
    """Same rows in the same order, same optimizer, schedule and inner warm-up."""
    model, other = tiny_model(torch.float64), tiny_model(torch.float64)
    losses = list(example.train(model, ROWS, steps=STEPS, batch_size=2, **SETTINGS))
    # The log is written in single precision.
    assert losses == pytest.approx(losses_of_meta_trainer(tmp_path, other), rel=1e-6)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=1e-9)
    assert model.model.inner_learning_rate_multiplier == 1.0


def test_loop_gives_the_losses_of_meta_trainer_in_bfloat16(tmp_path, example):
    losses = list(example.train(tiny_model(), ROWS, steps=STEPS, batch_size=2, mixed_precision="bf16", **SETTINGS))
    # Single-precision weights that differ in their last digit may round to another bfloat16.
    assert losses == pytest.approx(losses_of_meta_trainer(tmp_path, tiny_model(), bf16=True), rel=2e-3)
