"""What the inner loop differentiates twice, in few passes and little memory.

Meta-learning differentiates the inner gradient once more, and fused kernels have no second derivative. Each fast
function here stands beside a readable twin; what replaces it has to match that twin up to the second derivative.

    fast                                readable twin             computes
    `twice_differentiable_attention`    `plain_attention`         softmax(scale * Q K^T, masked) V
    `rms_normalize`                     `rms_normalize_plain`     x / root mean square of x
    `ClippedDescent`                    `clipped_descent`         W - lr min(1, max_norm / |g|) g

Axis letters: B batch rows, H heads, Q queries, K keys, C channels of a head.
"""

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

MANY_NUMBERS = 2**14  # see `are_many`


def is_asynchronous(tensor: torch.Tensor) -> bool:
    """Whether a look at a value would wait until the device has done all that it was asked for."""
    return tensor.device.type in ("cuda", "meta")


def autocast_type(device: torch.device) -> str:
    """The device's name for `torch.autocast`, which does not know the meta device."""
    return "cpu" if device.type == "meta" else device.type


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for bfloat16 and float16; float32 and float64 stay as they are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------------------- attention


def attention_weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * query key^T, masked) [B, H, Q, K], in at least float32."""
    return masked_softmax(query @ key.mT, mask, scale)


def masked_softmax(products: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * products, masked) along the last axis, in at least float32."""
    scores = products.to(at_least_float32(products.dtype)) * scale
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `twice_differentiable_attention`, in operations that autograd differentiates, and the weights [B, H, Q, K]."""
    weights = attention_weights(query, key, mask, scale).to(query.dtype)
    return weights @ value, weights


def twice_differentiable_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale * query key^T, masked) value, differentiable twice without ever storing scores.

    Args:
        query: [B, H, Q, C]; key, value: [B, H, K, C], all of one dtype; mask: bool, broadcast to [B, H, Q, K].

    Returns:
        [B, H, Q, C].
    """
    with torch.autocast(autocast_type(query.device), enabled=False):
        return _Attention.apply(query, key, value, mask, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return attention_weights(query, key, mask, scale).to(value.dtype) @ value

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, mask = ctx.saved_tensors
        with torch.autocast(autocast_type(query.device), enabled=False):
            return *_AttentionGradient.apply(query, key, value, grad_output, mask, ctx.scale), None, None


class _AttentionGradient(torch.autograd.Function):
    """First derivative of attention, and its own derivative.

    With P the probabilities, dP = dO V^T and D = rowsum(P dP):
        dS = P (dP - D),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
    """

    @staticmethod
    def forward(ctx, query, key, value, grad_output, mask, scale):
        ctx.save_for_backward(query, key, value, grad_output, mask)
        ctx.scale = scale
        probabilities, grad_scores, _ = _AttentionGradient.scores(query, key, value, grad_output, mask, scale)
        grad_scores = (grad_scores * scale).to(query.dtype)
        return grad_scores @ key, grad_scores.mT @ query, probabilities.to(query.dtype).mT @ grad_output

    @staticmethod
    def scores(query, key, value, grad_output, mask, scale):
        probabilities = attention_weights(query, key, mask, scale)
        grad_probabilities = (grad_output @ value.mT).to(probabilities.dtype)
        centred = grad_probabilities - (probabilities * grad_probabilities).sum(-1, keepdim=True)
        return probabilities, probabilities * centred, centred

    @staticmethod
    @once_differentiable
    def backward(ctx, query_bar, key_bar, value_bar):
        """Given the gradients of dQ, dK and dV, those of Q, K, V and dO.

        With G = scale (dQ_bar K^T + Q dK_bar^T) the gradient of dS, and g = rowsum(P G):
            of dP: P (G - g);   of P: dO dV_bar^T + G (dP - D) - g dP;   of S: P (of P - rowsum(P of P)).
        """
        query, key, value, grad_output, mask = ctx.saved_tensors
        scale, dtype = ctx.scale, query.dtype
        with torch.autocast(autocast_type(query.device), enabled=False):
            probabilities, grad_scores, centred = _AttentionGradient.scores(query, key, value, grad_output, mask, scale)
            grad_scores_bar = ((query_bar @ key.mT + query @ key_bar.mT) * scale).to(probabilities.dtype)
            row = (probabilities * grad_scores_bar).sum(-1, keepdim=True)
            grad_probabilities_bar = (probabilities * (grad_scores_bar - row)).to(dtype)
            # Terms that are constant along a row vanish in the softmax's own derivative below, so that
            # `centred` may stand for dP in the last product.
            probabilities_bar = (grad_output @ value_bar.mT).to(row.dtype) + (grad_scores_bar - row) * centred
            inner = (probabilities * probabilities_bar).sum(-1, keepdim=True)
            scores_bar = (probabilities * (probabilities_bar - inner) * scale).to(dtype)
            grad_scores = (grad_scores * scale).to(dtype)
            probabilities = probabilities.to(dtype)
            return (
                scores_bar @ key + grad_scores @ key_bar,
                scores_bar.mT @ query + grad_scores.mT @ query_bar,
                grad_probabilities_bar.mT @ grad_output,
                probabilities @ value_bar + grad_probabilities_bar @ value,
                None,
                None,
            )


# ---------------------------------------------------------------------------------------------- root mean square
#
#     n = r x,   r = (mean(x^2) + eps)^(-1/2)                      along the last axis
#     first derivative, for the gradient h of n:    x_bar = r (h - n mean(h n))
#     second derivative, for the gradient a of x_bar, with a_bar = r (a - n mean(a n)):
#         of h:  a_bar                                             (x_bar is a symmetric map of h)
#         of x:  -r (r n (mean(a h) - mean(a n) mean(h n)) + a_bar mean(h n) + x_bar mean(a n))


def rms_normalize_plain(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] divided by the root of its mean square along the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def are_many(x: torch.Tensor) -> bool:
    """Whether `inverse_rms` is faster than what `torch.rms_norm` does, on a CPU seven passes."""
    return x.device.type == "cpu" and x.numel() >= MANY_NUMBERS


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """r [..., 1] for x [..., D], in at least float32, as `torch.rms_norm` has it for few numbers; no autograd."""
    if not are_many(x):
        return torch.rsqrt(_mean_product(x, x).add_(eps))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least_float32(x.dtype))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_normalize_plain`, up to its second derivative."""
    return _Normalize.apply(x, eps)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps):
        r = inverse_rms(x, eps)
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
        x_bar = torch.addcmul(h, n, mean_hn, value=-1).mul_(r)
        ctx.save_for_backward(h, n, r, mean_hn, x_bar)
        return x_bar

    @staticmethod
    @once_differentiable
    def backward(ctx, a):
        h, n, r, mean_hn, x_bar = ctx.saved_tensors
        mean_an = _mean_product(a, n)
        a_bar = torch.addcmul(a, n, mean_an, value=-1).mul_(r)
        along_n = _mean_product(a, h).sub_(mean_an * mean_hn).mul_(r)
        of_x = (n * along_n).addcmul_(a_bar, mean_hn).addcmul_(x_bar, mean_an).mul_(-r)
        return of_x, a_bar, None, None


def _mean_product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first * second).mean(-1, keepdim=True)


# ------------------------------------------------------------------------------------------------ clipped descent
#
#     n = |g|  over all matrices of a row,   c = min(1, max_norm / n),   W' = W - lr c g
#
# `ClippedDescent` takes fewer passes over each matrix. Given the gradients W'_bar, and with d = sum <W'_bar, g>:
#
#     W_bar = W'_bar,   g_bar = -lr c (W'_bar - [n > max_norm] d / n^2 g)


def global_norms(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Joint L2 norm per row over all gradients [B, ...]: [B]. Its derivative at zero is zero, not NaN."""
    device = gradients[0].device
    squares: torch.Tensor = sum(g.square().flatten(1).sum(dim=1).to(device) for g in gradients)
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
        scales, pairs = _numbers(factors), zip(weights, gradients, strict=True)
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
            scales = _numbers(factors)
            gradient_bars = [_per_row(along, g) * g for g in gradients]
            gradient_bars = [
                along_g if bar is None else _subtract_scaled(along_g, bar, scales)
                for along_g, bar in zip(gradient_bars, new_bars, strict=True)
            ]
        return None, None, *new_bars, *gradient_bars


def _per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.device)[:, None, None]


def _numbers(factors: torch.Tensor) -> Sequence[float] | torch.Tensor:
    """Factors [B] as numbers, unless a look at them would wait for the device."""
    return factors if is_asynchronous(factors) else factors.tolist()


def _subtract_scaled(
    first: torch.Tensor, second: torch.Tensor, factors: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """first - factors * second, [B, out, in]: in one pass, which with numbers is one per row."""
    if isinstance(factors, torch.Tensor):
        return torch.addcmul(first, _per_row(factors, first), second, value=-1)
    result = torch.empty_like(first)
    for row, factor in enumerate(factors):
        torch.sub(first[row], second[row], alpha=factor, out=result[row])
    return result


def _row_dots(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[B] inner products of two [B, out, in]."""
    return torch.bmm(first.flatten(1)[:, None, :], second.flatten(1)[:, :, None]).flatten()
