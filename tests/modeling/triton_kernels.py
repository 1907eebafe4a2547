"""The Triton kernels against their plain twin in float64, up to the second derivative.

Run by `test_triton_attention`: interpreted on the CPU in a process of its own, compiled where there is a GPU.
"""

import pytest
import torch

from ttt_e2e.attention import TRITON, TWICE_DIFFERENTIABLE, attention_mask
from ttt_e2e.triton_attention import is_interpreted, triton_attention
from ttt_e2e.twice_differentiable import plain_attention

from .helpers import distance, loss_and_gradients, ragged, small_model

DEVICE = torch.device("cpu" if is_interpreted() else "cuda")
CASES = {
    # heads, key/value heads, queries, earlier keys, window, sinks, channels, tokens read by each row
    "window": (2, 2, 70, 90, 80, 0, 24, (90, 17)),
    "shared keys": (4, 2, 20, 15, 16, 0, 16, (15, 15)),
    "no history": (1, 1, 33, 0, None, 0, 64, (0,)),
    "sinks in the first block": (2, 1, 20, 23, 24, 4, 16, (300, 27)),
    "sinks far behind": (1, 1, 70, 140, 60, 4, 72, (900, 61)),
    "a window of one": (1, 1, 5, 0, 1, 0, 16, (0, 3)),
    "large heads": (1, 1, 20, 20, 30, 0, 256, (20,)),
}


def derivatives(attend, tensors):
    """Output, gradients, and the gradients of a function of these."""
    output = attend(*tensors)
    first = torch.autograd.grad(output.sin().sum(), tensors, create_graph=True)
    return [output, *first, *torch.autograd.grad(sum(grad.cos().sum() for grad in first), tensors)]


def relative_errors(case, dtype):
    heads, key_heads, queries, past, window, sinks, channels, read = CASES[case]
    rows, keys, scale = len(read), sinks + past + queries, channels**-0.5
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, queries, heads, channels), *2 * [(rows, keys, key_heads, channels)]]
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]
    masks = [
        attention_mask(kind, window, past, queries, read, device, sinks)
        for kind, device in ((TWICE_DIFFERENTIABLE, torch.device("cpu")), (TRITON, DEVICE))
    ]

    def plain(query, key, value):
        key, value = (states.repeat_interleave(heads // key_heads, dim=1) for states in (key, value))
        return plain_attention(query, key, value, masks[0], scale)[0]

    exact = derivatives(plain, [tensor.double().requires_grad_() for tensor in tensors])
    own = [tensor.to(DEVICE).requires_grad_() for tensor in tensors]
    found = derivatives(lambda *given: triton_attention(*given, masks[1], scale), own)
    pairs = zip(exact, found, strict=True)
    return [((own.double().cpu() - other).norm() / other.norm().clamp_min(1.0)).item() for other, own in pairs]


@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_plain_twin_in_float64(case):
    assert max(relative_errors(case, torch.float32)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_rounding(dtype):
    # A product of rounded factors loses some roundings of the dtype, and the second derivative is made of five.
    assert max(relative_errors("shared keys", dtype)) < 8 * torch.finfo(dtype).eps


def test_two_runs_are_bit_identical():
    assert relative_errors("shared keys", torch.float32) == relative_errors("shared keys", torch.float32)


@pytest.mark.parametrize("changes", [{}, {"num_sink_tokens": 2, "num_key_value_heads": 2}])
def test_the_model_has_the_same_loss_and_outer_gradient(changes):
    ids, mask = ragged()
    results = []
    for inner_attention in ("torch", "triton"):
        model = small_model(torch.float32, inner_attention=inner_attention, **changes).to(DEVICE)
        results.append(loss_and_gradients(model, ids.to(DEVICE), attention_mask=mask.to(DEVICE)))
    (loss, gradients), (other_loss, other_gradients) = results
    torch.testing.assert_close(loss, other_loss, rtol=1e-6, atol=0)
    assert distance(gradients, other_gradients) < 1e-5
