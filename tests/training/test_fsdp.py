"""Two processes train what one process trains, sharded by FSDP2, on CPU with gloo."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from ttt_e2e.training.guards import check_prepared

from . import helpers
from .helpers import random_rows
from .processes import WORLD, run_together
from .two_processes import (
    ACCUMULATION,
    DOUBLE,
    LEARNING_RATE,
    PRECISE,
    ROWS,
    STEPS,
    TRAINING,
    assert_alike,
    assert_same_training,
    model_of,
    placement,
    rows_with_few_labels,
    store,
    stored,
    train_case,
    trained,
    whole,
)

pytestmark = pytest.mark.slow  # several starts of two processes; tests/training/test_processes.py has DDP

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
    store(folder, "refused-muon", muon_refusal, folder)
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


def muon_refusal(folder):
    """The error of a sharded training with Muon, and the steps that were done until then."""
    config = DistributedConfig(fsdp_size=WORLD)
    model = AutoModelForCausalLM.from_pretrained(folder / "second_order-model", distributed_config=config).train()
    trainer = helpers.meta_trainer(folder / "muon", model, **(TRAINING | {"optimizer": "muon"}))
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


def test_muon_is_refused_where_matrices_are_cut(fsdp_folder):
    for error, steps in stored(fsdp_folder, "refused-muon"):
        assert error.startswith("ValueError: optimizer='muon' needs whole matrices, but") and "use optimizer" in error
        assert steps == 0


def test_tensor_parallelism_is_refused_with_second_order(fsdp_folder):
    for own in stored(fsdp_folder, "tensor-parallel-second_order"):
        for error in own:
            assert error.startswith("ValueError: `meta_gradient='second_order'` would be wrong with the")
            assert "mlp.up_proj.weight" in error
    for own in stored(fsdp_folder, "tensor-parallel-first_order"):
        assert own[1] is None
