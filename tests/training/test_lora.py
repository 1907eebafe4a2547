"""LoRA by peft: which weights it trains, that the meta-gradient reaches them, and what `add_lora` refuses."""

import sys

import pytest
import torch
from transformers import set_seed

from ttt_e2e.training.guards import learning_models
from ttt_e2e.training.lora import add_lora, inner_projections

from .adapters import ALPHA, RANK, WAYS, adapted, adapters, hand_made
from .helpers import easy_rows, meta_trainer, random_rows, tiny_model

TARGETS = ("all-linear", "prime")


def loss_and_gradients(model, seed=0):
    """Loss and gradients of the adapters, for rows of two mini-batches and a half."""
    ids = torch.tensor(random_rows(2, mini_batches=3)["input_ids"])[:, :11]
    set_seed(seed)  # dropout
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in adapters(model).items()}


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(("way", "prime_mlp"), [("by hand", True), ("add_lora", True), ("add_lora", False)])
def test_only_adapters_are_trained(tmp_path, way, targets, prime_mlp):
    model = tiny_model(use_prime_mlp=prime_mlp)
    set_seed(1)
    adapted_model = WAYS[way](model, targets, RANK, ALPHA)
    before = {name: parameter.detach().clone() for name, parameter in adapted_model.named_parameters()}
    rows = easy_rows(8)
    trainer = meta_trainer(tmp_path, adapted_model, rows, rows, learning_rate=0.03, per_device_train_batch_size=8)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    own = adapters(adapted_model)
    moved = {name for name, parameter in adapted_model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == own.keys()
    # Weight decay alone would move A, but never B, which starts at 0.
    assert all(parameter.any() for name, parameter in own.items() if "lora_B" in name)
    assert trainer.evaluate()["eval_loss"] < start - 0.2


@pytest.mark.parametrize("prime_mlp", [True, False])
def test_prime_adapters_lie_on_the_inner_weights_and_on_nothing_else(prime_mlp):
    fields = {"use_prime_mlp": prime_mlp}
    mlp = "prime_mlp" if prime_mlp else "mlp"
    expected = [f"model.layers.{block}.{mlp}.{name}_proj" for block in (1, 2) for name in ("gate", "up", "down")]
    assert inner_projections(tiny_model(**fields)) == expected
    found = adapters(adapted("prime", **fields))
    assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in found} == set(expected)
    assert found.keys() == adapters(hand_made(tiny_model(**fields), "prime")).keys()


def test_new_adapters_change_nothing():
    ids = torch.tensor(random_rows(2)["input_ids"])
    model = adapted("all-linear", random=False)
    torch.testing.assert_close(model(input_ids=ids).logits, tiny_model()(ids).logits, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- meta-gradient


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("targets", "prime_mlp"), [("all-linear", True), ("prime", True), ("prime", False)])
def test_the_gradient_of_the_adapters_is_the_meta_gradient(targets, prime_mlp, checkpointing):
    """The slope of the outer loss along a random direction; a gradient of first order misses it widely."""
    fields = {"use_prime_mlp": prime_mlp, "inner_checkpoint_every": 1}
    model = adapted(targets, torch.float64, **fields).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    _, exact = loss_and_gradients(model)
    learning_models(model)[0].config.meta_gradient = "first_order"
    _, first_order = loss_and_gradients(model)
    generator = torch.Generator().manual_seed(3)
    direction = {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for name, tensor in exact.items()
    }
    length = sum(tensor.square().sum() for tensor in direction.values()).sqrt()
    direction = {name: tensor / length for name, tensor in direction.items()}
    step, losses = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in adapters(model).items():
                parameter += sign * step * direction[name]
        losses.append(loss_and_gradients(model)[0])
    slope = (losses[0] - losses[1]) / (2 * step)
    along = {
        name: sum((gradients[part] * direction[part]).sum().item() for part in direction)
        for name, gradients in {"exact": exact, "first order": first_order}.items()
    }
    assert along["exact"] == pytest.approx(slope, rel=1e-6)
    assert abs(along["first order"] - slope) > 0.02 * abs(slope)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", TARGETS)
def test_checkpointing_changes_no_gradient(targets, dropout):
    results = []
    for enabled in (False, True):
        model = adapted(targets, torch.float64, dropout, inner_checkpoint_every=2).train()
        if enabled:
            model.activation_checkpointing_enable()
        results.append(loss_and_gradients(model))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-9, atol=1e-12)
    if dropout:
        assert loss_and_gradients(model, seed=1)[0] != results[1][0], "dropout is on"


@pytest.mark.parametrize("targets", TARGETS)
def test_checkpointing_changes_no_training(tmp_path, targets):
    """In float64 only the order of summation is left (losses are logged in float32)."""
    results = []
    for enabled in (False, True):
        trainer = meta_trainer(
            tmp_path, adapted(targets, torch.float64, inner_checkpoint_every=1), activation_checkpointing=enabled
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, {name: tensor.detach() for name, tensor in adapters(trainer.model).items()}))
    (losses, plain), (checkpointed_losses, checkpointed) = results
    assert losses == pytest.approx(checkpointed_losses, rel=1e-6)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


def test_inner_warm_up_reaches_the_model_within(tmp_path):
    rows = random_rows(2)
    ids = torch.tensor(rows["input_ids"])
    arguments = {"max_steps": 1, "logging_steps": 1, "inner_lr_init": 0.0, "inner_lr_warmup_steps": 10}
    trainer = meta_trainer(tmp_path, adapted("prime"), rows, **arguments)
    trainer.train()
    expected = {}
    for multiplier in (0.1, 1.0):
        model = adapted("prime").train()
        learning_models(model)[0].inner_learning_rate_multiplier = multiplier
        expected[multiplier] = model(input_ids=ids, labels=ids).loss.item()
    assert abs(expected[0.1] - expected[1.0]) > 3e-4
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected[0.1], rel=1e-6)
    assert learning_models(trainer.model)[0].inner_learning_rate_multiplier == 1.0


def test_logs_of_the_inner_loop_and_both_evaluations_are_there(tmp_path):
    trainer = meta_trainer(tmp_path, adapted("prime"), evaluation=easy_rows(4), max_steps=3)
    trainer.train()
    assert trainer.state.log_history[0]["nll_mini_batch_3"] > 0 and trainer.state.log_history[0]["inner_grad_norm"] > 0
    metrics = trainer.evaluate()
    assert abs(metrics["eval_loss"] - metrics["eval_loss_learning_off"]) > 1e-3


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "primes"}, "targets='primes' is unknown; did you mean 'prime'"),
        ({"targets": "q_proj"}, "targets='q_proj' is unknown; give 'all-linear' or 'prime'"),
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"alpha": 0.0}, r"alpha=0\.0: must be positive"),
        ({"dropout": 1.0}, r"dropout=1\.0: must be at least 0 and below 1"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **({"targets": "prime", "rank": RANK, "alpha": ALPHA} | changes))
    assert not adapters(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_prime_needs_suffix_blocks():
    model = tiny_model(num_suffix_layers=0, test_time_training=False)
    with pytest.raises(ValueError, match=r"without suffix blocks.*targets='all-linear'"):
        add_lora(model, "prime", RANK, ALPHA)
    assert adapters(add_lora(model, "all-linear", RANK, ALPHA))


@pytest.mark.parametrize("within", [False, True])
def test_a_model_with_adapters_is_refused(within):
    model = adapted("prime")
    with pytest.raises(ValueError, match="has adapters already: merge them first"):
        add_lora(model.get_base_model() if within else model, "all-linear", RANK, ALPHA)


def test_without_peft_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "ttt-e2e\[peft\]"'):
        add_lora(tiny_model(), "prime", RANK, ALPHA)
