"""Attention and normalisation equal their plain statements, up to the second derivative."""

import math
from types import SimpleNamespace

import pytest
import torch

from ttt_e2e import TTTE2ECache, twice_differentiable
from ttt_e2e.attention import TWICE_DIFFERENTIABLE, attention_function, attention_mask
from ttt_e2e.layers import TTTE2ERMSNorm
from ttt_e2e.twice_differentiable import rms_normalize, rms_normalize_plain

from .helpers import WINDOW, distance, gradients, loss_and_gradients, ragged, random_ids, small_model


def attention_case(groups=1, queries=5, history=4):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, queries, 6), (2, 4 // groups, history + queries, 6), (2, 4 // groups, history + queries, 6)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = attention_mask(TWICE_DIFFERENTIABLE, 6, history, queries, (history, 1), torch.device("cpu"))
    module = SimpleNamespace(num_key_value_groups=groups, training=False)

    def attend(implementation):
        return lambda q, k, v: attention_function(implementation)(module, q, k, v, mask, scaling=0.4)[0]

    return attend, tensors


@pytest.mark.parametrize("groups", [1, 2])
def test_twice_differentiable_attention_equals_eager_up_to_the_second_derivative(groups):
    attend, tensors = attention_case(groups)
    derivatives = []
    for implementation in ("eager", TWICE_DIFFERENTIABLE):
        output = attend(implementation)(*tensors)
        first = torch.autograd.grad(output.sin().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.cos().sum() for g in first), tensors)
        derivatives.append([output, *first, *second])
    torch.testing.assert_close(derivatives[1], derivatives[0], rtol=1e-10, atol=1e-12)


def test_twice_differentiable_attention_passes_gradcheck():
    attend, tensors = attention_case(queries=3, history=2)
    assert torch.autograd.gradcheck(attend(TWICE_DIFFERENTIABLE), tensors)
    assert torch.autograd.gradgradcheck(attend(TWICE_DIFFERENTIABLE), tensors)


@pytest.mark.parametrize("window", [None, 1, 5, WINDOW])
@pytest.mark.parametrize("history", [0, 3, WINDOW - 1])
def test_a_query_sees_itself_and_its_window_and_nothing_a_row_has_not_read(window, history):
    new, tokens = 7, [history, max(history - 2, 0)]
    mask = attention_mask("eager", window, history, new, tokens, torch.device("cpu")).expand(2, 1, new, -1)
    for row in range(2):
        for query in range(new):
            seen = [
                key
                for key in range(history + new)
                if key <= query + history
                and (window is None or key > query + history - window)
                and key >= history - tokens[row]
            ]
            assert mask[row, 0, query].nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"layer_types": ["full_attention"] * 4}])
def test_attention_implementations_agree(changes):
    """Eager, the kernels' interface and the twice differentiable form: same outputs, same outer gradient."""
    ids, mask = ragged()
    results = []
    for implementation in ("eager", "sdpa"):
        model = small_model(torch.float64, **changes)
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        results.append((logits, *loss_and_gradients(model, ids, attention_mask=mask)))
    (logits, loss, grads), (other_logits, other_loss, other_grads) = results
    torch.testing.assert_close(logits, other_logits, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(loss, other_loss, rtol=1e-12, atol=0)
    assert distance(grads, other_grads) < 1e-11


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("read_before", [0, 5, 50])
def test_attention_block_by_block_equals_attention_at_once(implementation, read_before, monkeypatch):
    """A long text's blocks give the loss and gradients of one mask, padding and history included."""
    ids = random_ids(2, 131)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    results = []
    for smallest in (3, 1000):
        monkeypatch.setattr("ttt_e2e.attention.SMALLEST_BLOCK", smallest)
        model = small_model(torch.float64, num_key_value_heads=2, attn_implementation=implementation)
        cache = TTTE2ECache(model.config)
        if read_before:
            with torch.no_grad():
                model(ids[:, :read_before], mask[:, :read_before], cache=cache)
        new = ids[:, read_before:]
        output = model(new, mask, cache=cache, labels=new)
        output.loss.backward()
        results.append({"logits": output.logits, **gradients(model)})
    for name, at_once in results[1].items():
        torch.testing.assert_close(results[0][name], at_once, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("many", [False, True])
def test_normalisation_equals_its_plain_statement_up_to_the_second_derivative(many, monkeypatch):
    """Value, gradient and second derivative in float64, near zero too, where the epsilon matters."""
    monkeypatch.setattr(twice_differentiable, "MANY_NUMBERS", 1 if many else math.inf)
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e-3
    results = []
    for normalize in (rms_normalize, rms_normalize_plain):
        leaf = x.clone().requires_grad_()
        value = normalize(leaf, 1e-6)
        (gradient,) = torch.autograd.grad(value.sin().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((gradient * x.cos()).sum() + value.cos().sum(), leaf)
        results.append((value, gradient, second))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
    leaf = x[1:].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: rms_normalize(y, 1e-6), leaf)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_the_same_with_and_without_a_gradient(dtype, many, monkeypatch):
    """Bit by bit: what is computed again for a backward pass may have run without a gradient first."""
    monkeypatch.setattr(twice_differentiable, "MANY_NUMBERS", 1 if many else math.inf)
    generator = torch.Generator().manual_seed(0)
    norm = TTTE2ERMSNorm(8, 1e-6).to(dtype)
    norm.weight.data.copy_(torch.randn(8, generator=generator))
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=generator).to(dtype)
    with torch.no_grad():
        silent = norm(x)
    assert silent.dtype == dtype and torch.equal(silent, norm(x.requires_grad_()))
    expected = rms_normalize_plain(x.double(), 1e-6) * norm.weight.double()
    torch.testing.assert_close(silent.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
