"""Checkpointing through time: memory that grows with the square root of the mini-batches, and the same gradients.

Bytes are those of torch's allocator, as in `tests/modeling/test_memory.py`.
"""

import math

import pytest
import torch
from transformers import modeling_utils

from ttt_e2e import checkpointing

from ..modeling.helpers import BATCH, gradients, random_ids, small_model
from ..modeling.test_memory import allocations

SHORT, LONG = 8, 64  # mini-batches
GROWTH = math.sqrt(LONG / SHORT)


def learner(checkpointing=True, dtype=torch.float32, **fields):
    model = small_model(dtype, **fields).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    return model


def loss_of(model, mini_batches, **arguments):
    ids = random_ids(1, mini_batches * BATCH)
    return model(ids, labels=ids, skip_logits=True, **arguments).loss


def peak(mini_batches, checkpointing=True, **fields):
    """Most bytes that one forward and backward pass holds at once, the gradients of the weights left out."""
    model = learner(checkpointing, **fields)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss_of(model, 2).backward()  # what the first call of an operation leaves behind is not counted
    return allocations(lambda: loss_of(model, mini_batches).backward())[0]


def of_the_sequence(mini_batches):
    """Bytes that a row itself holds for the backward pass, whatever is learned: the inputs of every block."""
    model = learner()
    loss_of(model, 2, test_time_training=False)
    return allocations(lambda: loss_of(model, mini_batches, test_time_training=False))[1]


def gradients_of(model, mini_batches=SHORT):
    """Gradients of two rows whose last mini-batch is cut short."""
    model.zero_grad()
    ids = random_ids(2, mini_batches * BATCH + 3)
    model(ids, labels=ids, skip_logits=True).loss.backward()
    return gradients(model)


def assert_alike(own, expected, tolerance=1e-12):
    assert own.keys() == expected.keys()
    apart = {name: ((own[name] - expected[name]).norm() / expected[name].norm()).item() for name in own}
    assert max(apart.values()) <= tolerance, max(apart, key=apart.get)


def assert_equal(own, expected):
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_peak_grows_with_the_square_root_of_the_mini_batches():
    sequence = {count: of_the_sequence(count) for count in (SHORT, LONG)}
    # Proportional to the length, or it would not be what the sequence holds.
    assert sequence[LONG] == pytest.approx(sequence[SHORT] * LONG / SHORT, rel=0.2)
    short, long = (peak(count) - sequence[count] for count in (SHORT, LONG))
    assert short > 0 and long <= GROWTH * short


def test_peak_grows_with_the_mini_batches_without_checkpointing():
    """What the test above would find if the graph of every inner step were kept."""
    short, long = (peak(count, checkpointing=False) for count in (SHORT, 2 * SHORT))
    assert 1.9 * short <= long <= 2.2 * short


def test_groups_are_of_the_square_root_of_the_mini_batches():
    default, four, three = (peak(16, inner_checkpoint_every=every) for every in (None, 4, 3))
    assert default == four != three


def test_offloading_costs_nothing_where_the_memory_is_the_same():
    assert peak(SHORT, inner_checkpoint_offload=True) == peak(SHORT)


def test_offloading_stores_the_fast_weights_and_nothing_else(monkeypatch):
    """On a CPU a copy would be the tensor itself, so that copies are recorded here instead."""
    moved = []
    monkeypatch.setattr(checkpointing, "_on_cpu", lambda tensor: moved.append(tensor.shape) or tensor.clone())
    model = learner(dtype=torch.float64, inner_checkpoint_every=2, inner_checkpoint_offload=True)
    found = gradients_of(model)
    layers = model.model.layers[model.config.num_prefix_layers :]
    shapes = [projection.weight.shape for layer in layers for projection in layer.inner_mlp.projections]
    groups = len(moved) // len(shapes)
    assert groups > 1 and [shape[1:] for shape in moved] == shapes * groups
    assert_equal(found, gradients_of(learner(dtype=torch.float64, inner_checkpoint_every=2)))


def test_horizon_costs_no_memory_beside_checkpointing():
    """The cuts are inside groups or between them; of neither is anything kept beyond the group."""
    for count in (SHORT, 2 * SHORT):
        assert peak(count, meta_gradient_horizon=4) <= 1.05 * peak(count)


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.fixture(scope="module")
def expected():
    """Gradients of float64 without any checkpointing."""
    return gradients_of(learner(checkpointing=False, dtype=torch.float64))


@pytest.mark.parametrize("every", [None, 1, 3, SHORT, LONG])
def test_gradients_do_not_depend_on_the_grouping(expected, every):
    assert_alike(gradients_of(learner(dtype=torch.float64, inner_checkpoint_every=every)), expected)


@pytest.mark.parametrize("every", [1, 3, LONG])
def test_first_order_gradients_do_not_depend_on_the_grouping(expected, every):
    fields = {"dtype": torch.float64, "meta_gradient": "first_order"}
    plain = gradients_of(learner(checkpointing=False, **fields))
    assert_alike(gradients_of(learner(inner_checkpoint_every=every, **fields)), plain)
    with pytest.raises(AssertionError):
        assert_alike(plain, expected)


@pytest.mark.parametrize("every", [1, 3])
def test_offloaded_fast_weights_give_the_same_gradients(every):
    fields = {"dtype": torch.float64, "inner_checkpoint_every": every}
    assert_equal(gradients_of(learner(inner_checkpoint_offload=True, **fields)), gradients_of(learner(**fields)))


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "whole-graph"])
def test_activations_saved_on_the_cpu_give_the_same_gradients(expected, checkpointing):
    model = learner(checkpointing, dtype=torch.float64)
    with torch.autograd.graph.save_on_cpu():
        found = gradients_of(model)
    assert_alike(found, expected)


@pytest.mark.parametrize("offload_state", [True, False])
def test_offloaded_activations_give_the_same_gradients(expected, offload_state, monkeypatch):
    # transformers asks for pinned memory, which there is only beside a GPU.
    monkeypatch.setattr(modeling_utils, "save_on_cpu", lambda **named: torch.autograd.graph.save_on_cpu())
    model = learner(False, torch.float64, inner_checkpoint_offload=offload_state)
    model.activation_checkpointing_enable(offload=True)
    assert model.model.gradient_checkpointing
    assert_alike(gradients_of(model), expected)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "whole-graph"])
@pytest.mark.parametrize("horizon", [SHORT + 1, LONG])
def test_horizon_beyond_the_last_mini_batch_is_none(expected, checkpointing, horizon):
    found = gradients_of(learner(checkpointing, torch.float64, meta_gradient_horizon=horizon))
    assert_alike(found, expected)


@pytest.mark.parametrize("horizon", [1, 3, SHORT])
@pytest.mark.parametrize("every", [1, 2, LONG])
def test_horizon_cuts_at_the_same_steps_in_any_grouping(expected, horizon, every):
    fields = {"dtype": torch.float64, "meta_gradient_horizon": horizon}
    plain = gradients_of(learner(checkpointing=False, **fields))
    assert_alike(gradients_of(learner(inner_checkpoint_every=every, **fields)), plain)
    with pytest.raises(AssertionError):
        assert_alike(plain, expected)
