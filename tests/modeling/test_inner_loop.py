"""The inner loop: exact gradients, its update rule, and fast paths that equal slow ones."""

import math

import pytest
import torch

from ttt_e2e import TTTE2ECache, call, checkpointing, fast_weights
from ttt_e2e.twice_differentiable import ClippedDescent, clip_factors, clipped_descent, global_norms

from .helpers import (
    BATCH,
    VOCAB,
    distance,
    gradients,
    loss_and_gradients,
    ragged,
    random_ids,
    small_model,
)


def learned(model, ids, **arguments):
    """The fast weights (differences to the slow ones) after reading `ids`, one copy per row."""
    cache = TTTE2ECache(model.config)
    with torch.no_grad():
        model(ids, cache=cache, **arguments)
    return cache.context.fast.own_copies().tensors


# ---------------------------------------------------------------------------------------------- outer gradient


def group_of(name: str) -> str:
    """The kind of a parameter: which part of the model, and in which half."""
    if ".layers." not in name:
        return name.split(".")[1]
    half = "prefix" if int(name.split(".")[2]) < 2 else "suffix"
    return f"{half} {'norm' if 'norm' in name else name.split('.')[3]}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "sliding_window": 13},
        {"inner_max_grad_norm": 0.0, "inner_learning_rate": 0.3},
        {"use_prime_mlp": False, "num_key_value_heads": 2, "num_suffix_layers": 3},
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": True},
        {"use_attention": False},
        {"inner_projections": "down", "inner_max_grad_norm": 0.5},
    ],
    ids=[
        "tied",
        "untied-odd-window",
        "no-clipping",
        "no-prime-grouped",
        "full-attention-in-the-suffix",
        "no-attention",
        "down",
    ],
)
def test_outer_gradient_equals_finite_differences(changes):
    """Through four mini-batches, the last of them incomplete, in a random direction per group of parameters."""
    model = small_model(torch.float64, **changes)
    ids = random_ids(2, 3 * BATCH + 5)
    norms = model(ids, labels=ids).inner_grad_norm
    assert norms.shape == (2, 3) and (norms > 1).all(), "clipping, where it is on, must be active"
    _, exact = loss_and_gradients(model, ids)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    step = (
        1e-4  # along unit directions: rounding (1e-16 / step) and truncation (step^2) of the quotient stay below 1e-8
    )

    @torch.no_grad()
    def loss_beside(directions, distance):
        for name, direction in directions.items():
            parameters[name] += distance * direction
        loss = model(ids, labels=ids).loss.item()
        for name, direction in directions.items():
            parameters[name] -= distance * direction
        return loss

    for group in sorted({group_of(name) for name in parameters}):
        directions = {
            name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            for name, parameter in parameters.items()
            if group_of(name) == group
        }
        length = math.sqrt(sum(direction.square().sum().item() for direction in directions.values()))
        directions = {name: direction / length for name, direction in directions.items()}
        slope = sum((exact[name] * direction).sum().item() for name, direction in directions.items())
        quotient = (loss_beside(directions, step) - loss_beside(directions, -step)) / (2 * step)
        assert slope == pytest.approx(quotient, rel=1e-5, abs=1e-8), group


def loss_of_everything(model, ids, mask):
    """A scalar of all differentiable outputs."""
    labels = ids.masked_fill(mask == 0, -100)
    outputs = model(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    states = torch.stack(outputs.hidden_states) * mask[..., None]
    logits = outputs.logits * mask[..., None]
    return outputs.loss + states.square().mean() + logits.sin().mean()


@pytest.mark.parametrize("every", [1, 2, 3, None])
@pytest.mark.parametrize(
    ("trained", "changes"),
    [
        ("", {"tie_word_embeddings": False}),
        ("", {"meta_gradient": "first_order"}),
        ("", {"meta_gradient_horizon": 2, "sliding_window": 13, "layer_types": ["full_attention"] * 4}),
        ("layers.0.self_attn.v_proj", {}),
        ("layers.3.prime_mlp", {}),
        ("layers.2.mlp.up_proj", {"use_prime_mlp": False}),
        ("model.norm", {}),
        ("", {"use_attention": False}),
        ("", {"inner_projections": "down"}),
    ],
    ids="all-untied first-order horizon-full prefix-only prime-only one-matrix norm-only no-attention down".split(),
)
def test_checkpointing_and_its_grouping_change_nothing(every, trained, changes, monkeypatch):
    """Same loss and gradients, also when most parameters are frozen, as under an adapter."""
    groups = []
    run = checkpointing.run_inner_loop
    monkeypatch.setattr(checkpointing, "run_inner_loop", lambda *args: groups.append(len(args[2])) or run(*args))
    model = small_model(torch.float64, inner_checkpoint_every=every, **changes).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    ids, mask = ragged()
    results = []
    for enable in (False, True):
        if enable:
            assert not groups
            model.activation_checkpointing_enable()
        model.zero_grad()
        loss = loss_of_everything(model, ids, mask)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    (loss, exact), (other_loss, other) = results
    assert max(groups) == (every or 2), "each group was run again in the backward pass"
    assert loss == pytest.approx(other_loss, rel=1e-12)
    assert exact and exact.keys() == other.keys()
    for name in exact:
        torch.testing.assert_close(other[name], exact[name], rtol=1e-9, atol=1e-10)


def test_second_and_first_order_share_the_loss_but_not_the_gradient():
    ids = random_ids(2, 3 * BATCH + 1)
    exact_loss, exact = loss_and_gradients(small_model(torch.float64), ids)
    loss, approximate = loss_and_gradients(small_model(torch.float64, meta_gradient="first_order"), ids)
    torch.testing.assert_close(loss, exact_loss)
    assert distance(approximate, exact) > 0.1


def test_the_gradient_horizon_cuts_the_gradient_only_within_the_text():
    ids = random_ids(2, 3 * BATCH + 1)
    exact_loss, exact = loss_and_gradients(small_model(torch.float64), ids)
    apart = {}
    for horizon in (1, 2, 3, 10):
        loss, cut = loss_and_gradients(small_model(torch.float64, meta_gradient_horizon=horizon), ids)
        torch.testing.assert_close(loss, exact_loss)
        apart[horizon] = distance(cut, exact)
    assert apart[1] > apart[2] > 1e-3
    assert max(apart[3], apart[10]) < 1e-12


def test_keys_and_values_carry_outer_gradient_from_one_mini_batch_to_the_next():
    """With inner learning rate 0 the mini-batches are linked by keys and values alone: the plain model's gradient."""
    model = small_model(torch.float64, inner_learning_rate=0.0)
    ids = random_ids(2, 3 * BATCH + 1)
    loss, grads = loss_and_gradients(model, ids)
    plain_loss, plain = loss_and_gradients(model, ids, test_time_training=False)
    torch.testing.assert_close(loss, plain_loss)
    assert distance(grads, plain) < 1e-12


# ------------------------------------------------------------------------------------------------- update rule


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize(
    "changes",
    [*({"sliding_window": window} for window in (8, 9, 10, 13, 16, 17, 25)), {"use_prime_mlp": False}],
    ids=str,
)
def test_inner_learning_rate_zero_is_the_plain_sliding_window_model(changes, differentiable):
    """Whatever the window: keys are handed from mini-batch to mini-batch, and forgotten neither early nor late."""
    model = small_model(inner_learning_rate=0.0, **changes)
    ids = random_ids(2, 4 * BATCH + 3)
    with torch.set_grad_enabled(differentiable):
        learning = model(ids, labels=ids)
        plain = model(ids, labels=ids, test_time_training=False)
    # One is computed mini-batch by mini-batch, the other at once: equal up to float32 rounding.
    torch.testing.assert_close(learning.token_nll, plain.token_nll, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(learning.loss, plain.loss, rtol=1e-6, atol=1e-6)
    assert learning.inner_loss.shape == (2, 4) and plain.inner_loss is None


def test_loss_at_random_initialisation_is_the_logarithm_of_the_vocabulary():
    model = small_model(initializer_range=0.02)
    ids = random_ids(4, 2 * BATCH + 1, low=0)
    with torch.no_grad():
        plain = model(ids, labels=ids, test_time_training=False).loss.item()
        first = model(ids, labels=ids).token_nll[:, :BATCH].mean().item()
    # Logits have a standard deviation of 0.02 * sqrt(32) = 0.11 and 64 or 32 targets are averaged.
    assert plain == pytest.approx(math.log(VOCAB), abs=0.06)
    assert first == pytest.approx(math.log(VOCAB), abs=0.06)


def test_learning_lowers_the_loss_on_a_text_that_repeats_itself():
    model = small_model(initializer_range=0.02)
    ids = random_ids(2, BATCH).repeat(1, 6)
    with torch.no_grad():
        nll = model(ids, labels=ids).token_nll
        plain = model(ids, labels=ids, test_time_training=False).token_nll
    torch.testing.assert_close(nll[:, :BATCH], plain[:, :BATCH], rtol=0, atol=1e-5)
    assert nll[:, -BATCH:].mean() < plain[:, -BATCH:].mean() - 0.1


@pytest.mark.parametrize("inner", [("gate_proj", "up_proj", "down_proj"), ("down_proj",)], ids=["all", "down"])
def test_the_step_is_the_clipped_gradient_of_the_mean_masked_loss(inner):
    """The first step, recomputed with autograd on the slow weights: loss, clip norm, step, all at once."""
    changes = {} if len(inner) == 3 else {"inner_projections": "down"}
    model = small_model(torch.float64, inner_max_grad_norm=0.2, inner_learning_rate=0.4, **changes)
    ids = random_ids(1, BATCH + 1)
    ids[0, 3] = model.config.bos_token_id
    outputs = model(ids, labels=ids)
    slow = [getattr(layer.prime_mlp, name).weight for layer in model.model.layers[2:] for name in inner]
    kept = torch.arange(BATCH) != 2  # the position whose target is BOS
    loss = model(ids, labels=ids, test_time_training=False).token_nll[0, kept].mean()
    grads = torch.autograd.grad(loss, slow)
    norm = torch.stack([g.norm() for g in grads]).norm()
    torch.testing.assert_close(outputs.inner_loss, loss[None, None].detach())
    torch.testing.assert_close(outputs.inner_grad_norm, norm[None, None])
    assert norm > 0.2
    for step, g in zip(learned(model, ids), grads, strict=True):
        torch.testing.assert_close(step[0], -0.4 * g * 0.2 / norm)


def test_clipping_has_no_epsilon():
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0, 1e30])
    assert clip_factors(norms, 1.0).tolist() == pytest.approx([1, 1, 1, 0.5, 1e-30])
    assert clip_factors(norms, 0.0).tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_the_analytic_derivative_of_a_step_is_that_of_its_plain_statement(max_norm):
    """Rows with a gradient of zero, below and above the norm at which it is clipped; the factor is differentiated."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.0, 0.01, 3.0], dtype=torch.float64)[:, None, None]
    shapes = [(3, 2, 4), (3, 4, 2)]
    weights, grads, bars = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(3)
    )
    inputs = [tensor.requires_grad_() for tensor in (*weights, *(scales * g for g in grads))]
    norms = global_norms(inputs[2:])
    assert norms[0] == 0 and norms[1] < 1 < norms[2]
    results = []
    for *new, found in (
        ClippedDescent.apply(0.3, max_norm, *inputs),
        (lambda pair: (*pair[0], pair[1]))(clipped_descent(0.3, max_norm, inputs[:2], inputs[2:])),
    ):
        derivatives = torch.autograd.grad(new, inputs, bars)
        assert all(derivative.isfinite().all() for derivative in derivatives)
        results.append([*new, found, *derivatives])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_each_row_is_clipped_by_its_own_norm():
    gradients = [torch.tensor([[3.0], [0.3]]), torch.tensor([[[4.0]], [[0.4]]])]
    assert global_norms(gradients).tolist() == pytest.approx([5.0, 0.5])


def test_a_mini_batch_without_targets_changes_no_weight_and_gives_finite_gradients():
    model = small_model(torch.float64)
    ids = random_ids(1, 3 * BATCH + 1)
    ids[0, BATCH + 1 : 2 * BATCH + 1] = model.config.bos_token_id
    before, after = (learned(model, ids[:, : length + 1]) for length in (BATCH, 2 * BATCH))
    torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-14)
    assert all(tensor.any() for tensor in before)
    outputs = model(ids, labels=ids)
    assert outputs.inner_loss[0, 1] == 0 and outputs.inner_grad_norm[0, 1] == 0
    loss, grads = loss_and_gradients(model, ids)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())


def test_without_a_bos_id_every_next_token_is_a_target():
    ids = torch.full((1, BATCH + 1), 1)
    masked, learns = small_model(bos_token_id=1), small_model(bos_token_id=None)
    assert not any(tensor.any() for tensor in learned(masked, ids))
    assert all(tensor.any() for tensor in learned(learns, ids))


def test_padding_is_found_by_the_mask_and_never_by_its_id():
    """The pad id inside the text is a token like any other."""
    one, other = small_model(pad_token_id=5), small_model(pad_token_id=6)
    ids = random_ids(1, 2 * BATCH + 1, high=8)
    assert (ids == 5).any() and (ids == 6).any()
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_labels_never_enter_the_inner_loss():
    model = small_model()
    ids = random_ids(2, 3 * BATCH + 1)
    labels = random_ids(2, 3 * BATCH + 1, seed=1)
    labels[:, :BATCH] = -100
    one, other = model(ids, labels=ids), model(ids, labels=labels, num_items_in_batch=7)
    assert torch.equal(one.inner_loss, other.inner_loss)
    assert torch.equal(one.logits, other.logits)
    assert not torch.equal(one.token_nll, other.token_nll)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "overflowing-norm"])
def test_a_gradient_that_is_not_finite_keeps_the_last_finite_weights_and_warns_once(bad, monkeypatch, caplog):
    """The second inner gradient of row 0 is made useless; its first step stays, and row 1 never notices."""
    model = small_model()
    ids = random_ids(2, 2 * BATCH + 1)
    first, other = learned(model, ids[:1, : BATCH + 1]), learned(model, ids[1:])
    calls = []

    def faulty(*args, grad=torch.autograd.grad, **kwargs):
        calls.append(grad(*args, **kwargs))
        if len(calls) % 2 == 0:
            calls[-1][0][0, 0, 0] = bad
        return calls[-1]

    monkeypatch.setattr(torch.autograd, "grad", faulty)
    type(call.logger).warning_once.cache_clear()
    both = learned(model, ids)
    norms = model(ids, use_cache=False).inner_grad_norm
    assert norms[0].isinf().tolist() == [False, True] and norms[1].isfinite().all()
    assert len([record for record in caplog.records if "inner gradient was not finite" in record.message]) == 1
    for mixed, last_finite, alone in zip(both, first, other, strict=True):
        torch.testing.assert_close(mixed[0], last_finite[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mixed[1], alone[0], rtol=1e-5, atol=1e-6)


def test_the_learning_rate_multiplier_acts_only_while_training():
    model, half = small_model(), small_model(inner_learning_rate=0.5)
    ids = random_ids(2, 2 * BATCH + 1)
    plain = model(ids).logits
    model.model.inner_learning_rate_multiplier = 0.5
    assert torch.equal(model(ids).logits, plain)
    torch.testing.assert_close(model.train()(ids).logits, half(ids).logits, rtol=0, atol=1e-5)
    assert (model(ids).logits - plain).abs().max() > 1e-2


# ---------------------------------------------------------------------------------- fast paths and slow twins


@pytest.mark.parametrize(
    "changes", [{}, {"use_prime_mlp": False, "tie_word_embeddings": False}, {"inner_projections": "down"}]
)
def test_every_form_of_the_fast_weights_computes_the_same(changes, monkeypatch):
    """Differences beside layers that are called, differences folded into the weight, and W + dW kept as one."""
    ids = random_ids(2, 3 * BATCH + 3)
    results = []
    for called, fold_from in ((True, 1), (False, 1), (False, 10**9)):
        monkeypatch.setattr(fast_weights, "FOLD_FROM_TOKENS", fold_from)
        model = small_model(torch.float64, **changes)
        if called:  # a hook must see every call, so the layers are no longer plain weights
            for layer in model.model.layers[2:]:
                for projection in layer.inner_mlp.projections:
                    projection.register_forward_hook(lambda *args: None)
        results.append((*loss_and_gradients(model, ids), learned(model, ids)))
    loss, grads, fast = results.pop(0)
    for other_loss, other_grads, other_fast in results:
        torch.testing.assert_close(loss, other_loss, rtol=1e-12, atol=0)
        assert distance(grads, other_grads) < 1e-12
        torch.testing.assert_close(fast, other_fast, rtol=1e-10, atol=1e-12)
