"""Division by the root mean square, differentiable twice, in few operations and little memory.

    n = r x,   r = (mean(x^2) + eps)^(-1/2)                      along the last axis
    first derivative, for the gradient h of n:    x_bar = r (h - n mean(h n))
    second derivative, for the gradient a of x_bar, with a_bar = r (a - n mean(a n)):
        of h:  a_bar                                             (x_bar is a symmetric map of h)
        of x:  -r (r n (mean(a h) - mean(a n) mean(h n)) + a_bar mean(h n) + x_bar mean(a n))

`rms_normalize_plain` is the readable twin.
"""

import torch
from torch.autograd.function import once_differentiable


def rms_normalize_plain(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] divided by the root of its mean square along the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_normalize_plain`, up to its second derivative."""
    return _Normalize.apply(x, eps)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps):
        r = torch.rsqrt(_mean_product(x, x).add_(eps))
        n = x * r
        ctx.save_for_backward(x, n, r)
        return n

    @staticmethod
    def backward(ctx, h):
        x, n, r = ctx.saved_tensors
        # n and r are functions of x; the second derivative accounts for that, so they enter as plain numbers.
        return _NormalizeGradient.apply(x, h, n.detach(), r), None


class _NormalizeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, n, r):
        mean_hn = _mean_product(h, n)
        x_bar = torch.sub(h, n * mean_hn).mul_(r)
        ctx.save_for_backward(h, n, r, mean_hn, x_bar)
        return x_bar

    @staticmethod
    @once_differentiable
    def backward(ctx, a):
        h, n, r, mean_hn, x_bar = ctx.saved_tensors
        mean_an = _mean_product(a, n)
        a_bar = torch.sub(a, n * mean_an).mul_(r)
        along_n = _mean_product(a, h).sub_(mean_an * mean_hn).mul_(r)
        of_x = (n * along_n).add_(a_bar * mean_hn).add_(x_bar * mean_an).mul_(-r)
        return of_x, a_bar, None, None


def _mean_product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first * second).mean(-1, keepdim=True)
