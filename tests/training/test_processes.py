"""Two processes train what one process trains: DDP and FSDP2, on CPU with gloo.

One pair of processes goes through all cases and stores what it found; each test compares one case with the same
training in this process, which is not distributed.
"""

import traceback

import pytest
import torch
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from ttt_e2e.training.guards import check_prepared

from . import helpers
from .helpers import random_rows, repeatable, tiny_model
from .processes import KILLED, WORLD, kill_self, run_together

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


# ------------------------------------------------------------------------------------------------------------------ DDP

DOUBLE = {"dtype": torch.float64}
ACCUMULATION = DOUBLE | {"gradient_accumulation_steps": 2, "per_device": 1}
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
}


def train_case(
    folder, world, dtype=torch.float32, few_labels=False, meta_gradient="second_order", row_count=16, **options
):
    rows = rows_with_few_labels() if few_labels else random_rows(row_count)
    per_device = options.pop("per_device", ROWS // WORLD) * (WORLD // world)
    return trained(folder, model_of(dtype, meta_gradient=meta_gradient), rows, per_device, **options)


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


# ---------------------------------------------------------------------------------------------------------------- FSDP2

FSDP = {
    "float32": {},
    "float64": DOUBLE,
    "checkpointing": DOUBLE | {"activation_checkpointing": True},
    "first-order": DOUBLE | {"meta_gradient": "first_order"},
    "first-order-checkpointing": DOUBLE | {"meta_gradient": "first_order", "activation_checkpointing": True},
}
BY_TRAINER = FSDP | {"accumulation": ACCUMULATION, "few-labels": DOUBLE | {"few_labels": True}}
PLAIN_LOOP = FSDP | {
    "untied": DOUBLE | {"tie_word_embeddings": False},
    "embedding-of-its-own": DOUBLE | {"tie_word_embeddings": False, "unit": ("embed_tokens",)},
}


def sharded(model, unit=()):
    """The model in FSDP2's units: its prefix blocks, one of the named modules together, and the whole with the rest."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers[: model.config.num_prefix_layers]:
        fully_shard(layer, mesh=mesh)
    if unit:
        fully_shard([model.model.get_submodule(name) for name in unit], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def plain_loop(model, rank, world, activation_checkpointing=False):
    """Losses, gradients and final weights of three steps of AdamW; each process takes its share of every batch."""
    if activation_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    batches = torch.tensor(random_rows(STEPS * ROWS)["input_ids"]).split(ROWS)
    losses, gradients = [], []
    for batch in batches:
        own = batch.chunk(world)[rank]
        loss = model(own, labels=own, skip_logits=True).loss
        loss.backward()
        gradients.append({name: whole(parameter.grad) for name, parameter in model.named_parameters()})
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "weights": {name: whole(parameter) for name, parameter in model.named_parameters()},
        "placements": {name: placement(parameter) for name, parameter in model.named_parameters()},
    }


def loop_case(rank, world, dtype=torch.float32, unit=(), activation_checkpointing=False, **fields):
    model = model_of(dtype, **fields)
    return plain_loop(sharded(model, unit) if world > 1 else model, rank, world, activation_checkpointing)


def trainer_case(folder, dtype=torch.float32, few_labels=False, meta_gradient="second_order", **options):
    model = AutoModelForCausalLM.from_pretrained(
        folder / f"{meta_gradient}-model", dtype=dtype, distributed_config=DistributedConfig(fsdp_size=WORLD)
    ).train()
    per_device = options.pop("per_device", ROWS // WORLD)
    return trained(folder, model, rows_with_few_labels() if few_labels else None, per_device, **options)


def fsdp_worker(folder):
    torch.distributed.init_process_group("gloo")
    for name, options in PLAIN_LOOP.items():
        store(folder, f"loop-{name}", loop_case, torch.distributed.get_rank(), WORLD, **options)
    for name, options in BY_TRAINER.items():
        store(folder, f"trainer-{name}", trainer_case, folder, **options)
    for name, case in REFUSED.items():
        store(folder, f"refused-{name}", refusal_of, *case)
    store(folder, "refused-trainer", trainer_refusal, folder)
    for order in ("second_order", "first_order"):
        store(folder, f"tensor-parallel-{order}", tensor_parallel_refusal, order)


@pytest.fixture(scope="module")
def fsdp_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    for order in ("second_order", "first_order"):
        model_of(torch.float64, meta_gradient=order).save_pretrained(folder / f"{order}-model")
    run_together(fsdp_worker, folder)
    return folder


def assert_sharded(found):
    """Every parameter is a DTensor over two processes, each of which holds one half."""
    for rank_of in zip(*(own["placements"].items() for own in found), strict=True):
        name = rank_of[0][0]
        assert all(own is not None for _, own in rank_of), f"{name} is not sharded"
        assert {own[:2] for _, own in rank_of} == {(str((Shard(0),)), WORLD)}
        assert sum(own[2] for _, own in rank_of) == found[0]["weights"][name].numel()
        assert max(own[2] for _, own in rank_of) < found[0]["weights"][name].numel()


@pytest.mark.parametrize("name", PLAIN_LOOP)
def test_fsdp_in_a_plain_loop(fsdp_folder, name):
    options = PLAIN_LOOP[name]
    dtype = options.get("dtype", torch.float32)
    expected, found = loop_case(0, 1, **options), stored(fsdp_folder, f"loop-{name}")
    assert_sharded(found)
    mean = torch.stack([own["losses"] for own in found]).mean(dim=0)
    torch.testing.assert_close(mean, expected["losses"], rtol=PRECISE[dtype], atol=0)
    for own in found:
        assert_same_training(own, expected, dtype)


@pytest.mark.parametrize("name", BY_TRAINER)
def test_fsdp_by_from_pretrained(tmp_path, fsdp_folder, name):
    expected, found = train_case(tmp_path, 1, **BY_TRAINER[name]), stored(fsdp_folder, f"trainer-{name}")
    assert_sharded(found)
    for own in found:
        assert own["world"] == WORLD and "DistributedDataParallel" not in own["wrapped"]
        assert_alike(own, expected, BY_TRAINER[name].get("dtype", torch.float32))


# ------------------------------------------------------------------------------------------------------------- refusals

# Whether embeddings are tied, the modules that are a unit of their own, and the class that the error names.
REFUSED = {
    "suffix block": (True, ("layers.2",), "TTTE2ESuffixLayer"),
    "part of a suffix block": (True, ("layers.3.mlp",), "TTTE2EMLP"),
    "norm": (True, ("norm",), "TTTE2ERMSNorm"),
    # Only together: torch itself refuses a unit with one of two tied weights.
    "tied embedding and head": (True, ("embed_tokens", "lm_head"), "Linear"),
    "head": (False, ("lm_head",), "Linear"),
}


def refusal_of(tied, unit, _):
    """The errors of a forward pass and of the trainer's check."""
    model = sharded(model_of(tie_word_embeddings=tied), unit)
    ids = torch.tensor(random_rows(2)["input_ids"])
    return [error_of(lambda: model(ids, labels=ids)), error_of(lambda: check_prepared(model))]


def trainer_refusal(folder):
    """The error of a training whose plan makes a unit of the norm, and the steps that were done until then."""
    config = DistributedConfig(fsdp_size=WORLD, fsdp_plan={"model.norm": "free_full_weight"})
    model = AutoModelForCausalLM.from_pretrained(folder / "second_order-model", distributed_config=config).train()
    trainer = helpers.meta_trainer(folder / "refused", model, **TRAINING)
    return error_of(trainer.train), trainer.state.global_step


def tensor_parallel_refusal(order):
    """The errors of a forward pass and of the trainer's check where a suffix block's weight is split by channels."""
    model = model_of(meta_gradient=order)
    mesh = init_device_mesh("cpu", (WORLD,))
    projection = model.model.layers[2].mlp.up_proj
    projection.weight = torch.nn.Parameter(distribute_tensor(projection.weight.detach(), mesh, [Shard(0)]))
    ids = torch.tensor(random_rows(2)["input_ids"])
    return [error_of(lambda: model(ids, labels=ids)), error_of(lambda: check_prepared(model))]


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", REFUSED)
def test_units_within_the_inner_loop_are_refused(fsdp_folder, name):
    for own in stored(fsdp_folder, f"refused-{name}"):
        for error in own:
            assert error.startswith("ValueError: FSDP shards a")
            assert f"{REFUSED[name][2]} as a unit of its own" in error
            assert "give fully_shard only the prefix blocks" in error


def test_units_within_the_inner_loop_are_refused_before_the_first_step(fsdp_folder):
    for error, steps in stored(fsdp_folder, "refused-trainer"):
        assert error.startswith("ValueError: FSDP shards a") and "TTTE2ERMSNorm as a unit of its own" in error
        assert steps == 0


def test_tensor_parallelism_is_refused_with_second_order(fsdp_folder):
    for own in stored(fsdp_folder, "tensor-parallel-second_order"):
        for error in own:
            assert error.startswith("ValueError: `meta_gradient='second_order'` would be wrong with the")
            assert "mlp.up_proj.weight" in error
    for own in stored(fsdp_folder, "tensor-parallel-first_order"):
        assert own[1] is None
