"""Trainings spread over two processes, what they find, and the same training in one process."""

import traceback

import pytest
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from . import helpers
from .helpers import random_rows, repeatable, tiny_model
from .processes import WORLD

STEPS, ROWS, LEARNING_RATE = 3, 4, 1e-4  # optimizer steps, and rows of the global batch of each
SIZES = {"num_hidden_layers": 4, "inner_learning_rate": 0.5}  # two prefix and two suffix blocks
TRAINING = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "warmup_steps": 0,
    "inner_lr_warmup_steps": 2,
    "optim": "adamw_torch",
    # AdamW turns the smallest of gradients into a whole step: in float32 only a low rate keeps such noise below 1e-6.
    "learning_rate": LEARNING_RATE,
}
PRECISE = {torch.float32: 1e-6, torch.float64: 1e-9}


class Gradients(TrainerCallback):
    """The gradients of every outer step, whole, as they are before clipping."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **named):
        self.steps.append({name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()})


def whole(tensor):
    """A copy of a tensor, with all its parts."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def placement(parameter):
    """How a parameter is split over the processes, and the size of this process's part; None for a plain tensor."""
    if not isinstance(parameter, DTensor):
        return None
    return str(parameter.placements), parameter.device_mesh.size(), parameter.to_local().numel()


def model_of(dtype=torch.float32, **fields):
    return tiny_model(dtype, **(SIZES | fields)).train()


def rows_with_few_labels():
    """Rows of which every second one is labelled at its last tokens only, so that processes count differently."""
    ids = random_rows()["input_ids"]
    labels = [row if index % 2 else [-100] * 11 + row[11:] for index, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def trained(folder, model, rows=None, per_device=ROWS // WORLD, **arguments):
    """Logs, gradients and final weights of a training by MetaTrainer."""
    gradients = Gradients()
    trainer = helpers.meta_trainer(
        folder,
        model,
        random_rows() if rows is None else rows,
        callbacks=[gradients],
        **(TRAINING | arguments | {"per_device_train_batch_size": per_device}),
    )
    trainer.train()
    log = [entry for entry in repeatable(trainer.state.log_history) if "loss" in entry]
    weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    found = {
        "log": log,
        "gradients": gradients.steps,
        "weights": weights,
        "world": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "placements": {name: placement(parameter) for name, parameter in trainer.model.named_parameters()},
    }
    return found


def assert_alike(own, expected, dtype):
    """Logs, which are of float32, to 1e-6; gradients and parameters as far as the type goes.

    In float32 gradients are compared in the first step: later ones show AdamW's noise in tiny gradients.
    """
    assert len(own["log"]) == len(expected["log"]) == STEPS
    for one, other in zip(own["log"], expected["log"], strict=True):
        assert one.keys() == other.keys() and {"nll_mini_batch_3", "grad_norm", "inner_grad_norm"} <= one.keys()
        assert one == pytest.approx(other, rel=1e-6)
    assert_same_training(own, expected, dtype)


def assert_same_training(own, expected, dtype):
    assert len(own["gradients"]) == len(expected["gradients"]) == STEPS
    for step in range(STEPS if dtype == torch.float64 else 1):
        assert_close(own["gradients"][step], expected["gradients"][step], PRECISE[dtype])
    assert_close(own["weights"], expected["weights"], PRECISE[dtype])


def assert_close(own, expected, tolerance):
    """Each tensor to a relative L2 distance."""
    assert own.keys() == expected.keys()
    apart = {name: ((own[name] - expected[name]).norm() / expected[name].norm()).item() for name in own}
    assert max(apart.values()) <= tolerance, {name: value for name, value in apart.items() if value > tolerance}


DOUBLE = {"dtype": torch.float64}
ACCUMULATION = DOUBLE | {"gradient_accumulation_steps": 2, "per_device": 1}


def train_case(
    folder, world, dtype=torch.float32, few_labels=False, meta_gradient="second_order", row_count=16, **options
):
    rows = rows_with_few_labels() if few_labels else random_rows(row_count)
    per_device = options.pop("per_device", ROWS // WORLD) * (WORLD // world)
    return trained(folder, model_of(dtype, meta_gradient=meta_gradient), rows, per_device, **options)


def store(folder, name, case, *arguments, **options):
    """Keep what a case finds, or its error, and go on with the next one."""
    try:
        found = case(*arguments, **options)
    except Exception:
        found = traceback.format_exc()
    torch.save(found, folder / f"{name}-{torch.distributed.get_rank()}.pt")


def stored(folder, name):
    """What each of the two processes found."""
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(WORLD)]
    if isinstance(found[0], str):
        raise RuntimeError(found[0])
    return found
