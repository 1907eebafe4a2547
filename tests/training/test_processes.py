"""Two processes train what one process trains: DDP and FSDP2, on CPU with gloo.

Each check runs in two processes and compares with the same training without any distribution, computed in each of them.
"""

from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from ttt_e2e.training.guards import check_prepared

from . import helpers
from .helpers import random_rows, repeatable, tiny_model
from .processes import WORLD, run_together

STEPS, ROWS = 3, 4  # optimizer steps, and rows of the global batch of each
SIZES = {"num_hidden_layers": 4, "inner_learning_rate": 0.5}  # two prefix and two suffix blocks
TRAINING = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "warmup_steps": 0,
    "inner_lr_warmup_steps": 2,
    "optim": "adamw_torch",
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
    # Clipping replaces gradients by scaled ones, which would hide a wrong factor.
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
    return {"log": log, "gradients": gradients.steps, "weights": weights, "trainer": trainer}


def reference(folder, dtype, expected):
    """Read what one process trained."""
    return expected[str(dtype)]


def assert_alike(own, expected, dtype):
    """Logs of float32 and gradients to 1e-6; parameters as far as the type goes."""
    tolerance = PRECISE[dtype]
    assert len(own["log"]) == len(expected["log"]) == STEPS
    for one, other in zip(own["log"], expected["log"], strict=True):
        assert one.keys() == other.keys() and {"nll_mini_batch_3", "grad_norm", "inner_grad_norm"} <= one.keys()
        assert one == pytest.approx(other, rel=1e-6)
    for one, other in zip(own["gradients"], expected["gradients"], strict=True):
        assert_close(one, other, tolerance)
    assert_close(own["weights"], expected["weights"], tolerance)


def assert_close(own, expected, tolerance):
    """Each tensor to a relative L2 distance."""
    assert own.keys() == expected.keys()
    apart = {name: ((own[name] - expected[name]).norm() / expected[name].norm()).item() for name in own}
    assert max(apart.values()) <= tolerance, {name: value for name, value in apart.items() if value > tolerance}


# ------------------------------------------------------------------------------------------------------------------ DDP

DDP = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "checkpointing": {"activation_checkpointing": True, "dtype": torch.float64},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device": 1, "dtype": torch.float64},
    "few-labels": {"few_labels": True, "dtype": torch.float64},
    "few-labels-accumulation": {
        "few_labels": True,
        "gradient_accumulation_steps": 2,
        "per_device": 1,
        "dtype": torch.float64,
    },
    "first-order": {"meta_gradient": "first_order", "dtype": torch.float64},
}


def train_case(folder, world, dtype=torch.float32, few_labels=False, meta_gradient="second_order", **options):
    rows = rows_with_few_labels() if few_labels else None
    per_device = options.pop("per_device", ROWS // WORLD) * (WORLD // world)
    return trained(folder, model_of(dtype, meta_gradient=meta_gradient), rows, per_device, **options)


def ddp_worker(folder, expected):
    for name, options in DDP.items():
        own = train_case(folder, WORLD, **options)
        trainer = own.pop("trainer")
        assert trainer.args.world_size == WORLD and type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        with named(name):
            assert_alike(own, expected[name], options.get("dtype", torch.float32))


@contextmanager
def named(name):
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


def test_ddp_trains_what_one_process_trains(tmp_path):
    expected = {name: train_case(tmp_path, 1, **options) for name, options in DDP.items()}
    for values in expected.values():
        assert values.pop("trainer").args.world_size == 1
    torch.save(expected, tmp_path / "expected.pt")
    run_together(run_with_file, ddp_worker, tmp_path)


def run_with_file(worker, folder):
    worker(folder, torch.load(folder / "expected.pt"))
