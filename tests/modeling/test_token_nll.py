"""The loss of every token: the fast form against the plain one, to the second derivative."""

import pytest
import torch

from ttt_e2e.causal_lm_loss import NO_TARGET, plain_token_nll, token_nll


def texts(rows=2, length=5, vocabulary=13, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, length, vocabulary, dtype=torch.float64, generator=generator)).to(dtype)
    first, second = torch.randint(vocabulary, (2, rows, length), generator=generator)
    first[0, 1] = second[1, 4] = NO_TARGET
    return logits.requires_grad_(), first, second


@pytest.mark.parametrize("at_once", [1, 30, 2**18])
def test_the_fast_form_is_the_plain_one_up_to_the_second_derivative(at_once, monkeypatch):
    monkeypatch.setattr("ttt_e2e.causal_lm_loss.CACHED_LOGITS", at_once)
    logits, *targets = texts()
    results = []
    for found in (token_nll(logits, *targets), tuple(plain_token_nll(logits, own) for own in targets)):
        (gradient,) = torch.autograd.grad(found[0].sin().sum() + found[1].sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad((gradient * logits.cos()).sum() + found[1].square().sum(), logits)
        results.append((*found, gradient, second))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-13)
    assert results[0][0][0, 1] == 0 and not results[0][2].isnan().any()


def test_its_derivatives_are_those_of_finite_differences():
    logits, *targets = texts(2, 5, 5)
    assert torch.autograd.gradcheck(lambda z: token_nll(z, *targets), logits)
    assert torch.autograd.gradgradcheck(lambda z: token_nll(z, *targets), logits)


def test_of_half_precision_the_loss_is_float32_and_the_gradient_rounded_once():
    logits, first, _ = texts(dtype=torch.bfloat16)
    exact = logits.detach().double().requires_grad_()
    (loss,), plain = token_nll(logits, first), plain_token_nll(exact, first)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    plain.sum().backward()
    torch.testing.assert_close(logits.grad, exact.grad.bfloat16(), rtol=2**-7, atol=1e-6)
