"""One step of clipped gradient descent, with an analytic derivative.

    n = |g|  over all matrices of a row,   c = min(1, max_norm / n),   W' = W - lr c g

`clipped_descent` states this in plain operations; `ClippedDescent` computes the same with fewer passes over each
matrix. Given the gradients W'_bar, and with d = sum <W'_bar, g>:

    W_bar = W'_bar,   g_bar = -lr c (W'_bar - [n > max_norm] d / n^2 g)
"""

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable


def global_norms(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Joint L2 norm per row over all gradients [B, ...]: [B]. Its derivative at zero is zero, not NaN."""
    device = gradients[0].device
    squares = sum(g.square().flatten(1).sum(dim=1).to(device) for g in gradients)
    is_zero = squares == 0
    return squares.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


def clip_factors(norms: torch.Tensor, max_norm: float) -> torch.Tensor:
    """min(1, max_norm / norm) per row, without an epsilon; 1 everywhere when `max_norm` is 0."""
    if not max_norm:
        return torch.ones_like(norms)
    return max_norm / norms.clamp_min(max_norm)


def clipped_descent(
    learning_rate: float, max_norm: float, weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """New weights and the norms [B], in operations that autograd differentiates."""
    norms = global_norms(gradients)
    steps = learning_rate * clip_factors(norms, max_norm)
    pairs = zip(weights, gradients, strict=True)
    return [w - _per_row(steps, w) * g for w, g in pairs], norms


class ClippedDescent(torch.autograd.Function):
    """`apply(learning_rate, max_norm, *weights, *gradients)` -> new weights [B, out, in] each, and the norms [B].

    The norms are for reports: no gradient flows back from them.
    """

    @staticmethod
    def forward(ctx, learning_rate, max_norm, *tensors):
        weights, gradients = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        device = gradients[0].device
        parts = [torch.linalg.vector_norm(g.flatten(1), dim=1).to(device) for g in gradients]
        norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        factors = learning_rate * clip_factors(norms, max_norm)
        ctx.max_norm = max_norm
        ctx.save_for_backward(norms, factors, *gradients)
        ctx.mark_non_differentiable(norms)
        ctx.set_materialize_grads(False)
        scales, pairs = factors.tolist(), zip(weights, gradients, strict=True)
        return *(_subtract_scaled(w, g, scales) for w, g in pairs), norms

    @staticmethod
    @once_differentiable
    def backward(ctx, *new_bars):
        norms, factors, *gradients = ctx.saved_tensors
        new_bars = new_bars[:-1]
        gradient_bars = [None] * len(gradients)
        if any(ctx.needs_input_grad[2 + len(gradients) :]):
            pairs = [(bar, g) for bar, g in zip(new_bars, gradients, strict=True) if bar is not None]
            dots = sum(_row_dots(bar, g).to(norms.device) for bar, g in pairs)
            clipped = (norms > ctx.max_norm) if ctx.max_norm else torch.zeros_like(norms, dtype=torch.bool)
            along = (factors * dots / norms.square()).masked_fill(~clipped, 0.0)
            scales = factors.tolist()
            gradient_bars = [_per_row(along, g) * g for g in gradients]
            gradient_bars = [
                along_g if bar is None else _subtract_scaled(along_g, bar, scales)
                for along_g, bar in zip(gradient_bars, new_bars, strict=True)
            ]
        return None, None, *new_bars, *gradient_bars


def _per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.device)[:, None, None]


def _subtract_scaled(first: torch.Tensor, second: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    """first - factors * second, [B, out, in]: one pass per row, where a broadcast product would take two."""
    result = torch.empty_like(first)
    for row, factor in enumerate(factors):
        torch.sub(first[row], second[row], alpha=factor, out=result[row])
    return result


def _row_dots(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[B] inner products of two [B, out, in]."""
    return torch.bmm(first.flatten(1)[:, None, :], second.flatten(1)[:, :, None]).flatten()
