"""The inner loop of TTT-Linear and TTT-MLP: gradient descent on a head's own linear layer or MLP (arXiv 2407.04620).

For one row and one head, with starting weights S of the mini-batch and its tokens t:

    inner loss      l_t(W) = 1/2 |f(k_t; W) - v_t|^2
    running sum     A_t = sum of rate_s * gradient of l_s at S, over the tokens s <= t of this mini-batch
    weights         W_t = S - scale_t A_t
    output          z_t = f(q_t; W_t)
    next start      S'  = W_t at the mini-batch's last token

f(x) = x + LN(f_res(x)) with a LayerNorm that the inner loop does not change, or f(x) = f_res(x); f_res is a linear
layer (TTT-Linear) or a two-layer MLP with the tanh form of GELU (TTT-MLP). Biases learn like weights.

`primal_step` builds every W_t. `dual_step` computes the same without them: for an inner layer with inputs x_s (of the
keys) and gradients g_s (of its outputs), and inputs y_t of the queries,

    y_t W_t + b_t = y_t S + b - scale_t * sum over s <= t of rate_s (y_t x_s + 1) g_s

Everything is differentiable, the inner gradients included. The caller chooses the dtype: all tensors in one dtype, at
least float32, because small steps vanish in bfloat16.

Axis letters: B batch rows, H heads, G mini-batches, N their slots, C channels of a head.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import float64_device

NORM_EPS = 1e-6

# A step of some form: (views of a mini-batch, state, learner) -> (f_res of the queries, increments of the sums).
Step = Callable[["StepViews", "LearnerState", "InnerLearner"], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]


class TTTHeadNorm(nn.Module):
    """Weight and bias [H, C] of the LayerNorm within f, one per head.

    It is called for them, so that whatever moves parameters when a module is called (offloading, sharding) sees it.
    """

    def __init__(self, heads: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, channels))
        self.bias = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias as [H, 1, C]."""
        return self.weight.to(dtype).unsqueeze(1), self.bias.to(dtype).unsqueeze(1)


class LearnerState(NamedTuple):
    """What a layer has learned.

    Attributes:
        weights: weight [B, H, in, out] and bias [B, H, 1, out] of each inner layer, at the start of the mini-batch.
        sums: A_t of the mini-batch so far, in the same shapes; None when it has no token yet.
    """

    weights: tuple[torch.Tensor, ...]
    sums: tuple[torch.Tensor, ...] | None


class Views(NamedTuple):
    """What the inner loop sees of the tokens, by slots of mini-batches.

    Attributes:
        query, key, value: [B, H, G, N, C].
        rate: [B, H, G, N] learning rate of each token; 0 in slots without a token.
        scale: [1 or B, 1, G, N] factor of the running sum.
        last_scale: [] that of a mini-batch's last token.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rate: torch.Tensor
    scale: torch.Tensor
    last_scale: torch.Tensor


class StepViews(NamedTuple):
    """One mini-batch.

    Attributes:
        query, key, target: [B, H, N, C]; target is v, less k where f adds its input.
        rate: [B, H, N, 1]; scale: [1 or B, 1, N, 1].
        causal_scale: [1 or B, 1, N, N] scale_t at (t, s <= t), else 0; only for the dual form.
        near: [B, H, N, N] scale_t (q_t k_s + 1) at (t, s <= t), else 0; only for the dual form.
    """

    query: torch.Tensor
    key: torch.Tensor
    target: torch.Tensor
    rate: torch.Tensor
    scale: torch.Tensor
    near: torch.Tensor | None = None
    causal_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class InnerLearner:
    """What does not change within the inner loop.

    Attributes:
        norm: weight and bias [H, 1, C] of LN; None for f = f_res.
        learn_bias: biases take part in the descent.
    """

    norm: tuple[torch.Tensor, torch.Tensor] | None
    learn_bias: bool


def learn_slots(
    views: Views,
    state: LearnerState,
    learner: InnerLearner,
    complete: Sequence[Sequence[bool]],
    step: Step | None = None,
    checkpoint_every: int | None = None,
) -> tuple[torch.Tensor, LearnerState]:
    """Read mini-batches one after the other.

    Args:
        state: before them; its sums are those of tokens that the first mini-batch had in an earlier call.
        complete: per mini-batch and row, whether it is full after these slots. An unfinished mini-batch must be the
            row's last one.
        step: `dual_step` (default) or `primal_step`.
        checkpoint_every: mini-batches whose graph is recomputed together in the backward pass; None keeps all graphs.

    Returns:
        z [B, H, G, N, C], and the state after the last token of each row.
    """
    step = step or dual_step
    steps = views.key.shape[2]
    size = checkpoint_every or steps
    outputs = []
    for first in range(0, steps, size):
        group = Views(*(tensor[:, :, first : first + size] for tensor in views[:-1]), last_scale=views.last_scale)
        arguments = (group, state, learner, complete[first : first + size], step)
        if checkpoint_every is None:
            output, state = _learn_group(*arguments)
        else:
            output, state = checkpoint(_learn_group, *arguments, use_reentrant=False)
        outputs.append(output)
    output = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    if learner.norm is None:
        return output, state
    weight, bias = (tensor.unsqueeze(1) for tensor in learner.norm)
    return views.query + F.layer_norm(output, output.shape[-1:], eps=NORM_EPS) * weight + bias, state


def default_checkpoint_every(mini_batches: int) -> int:
    """Mini-batches per group for which the stored states and one group's graph are about equally many."""
    return max(1, round(math.sqrt(mini_batches)))


def _learn_group(
    views: Views, state: LearnerState, learner: InnerLearner, complete: Sequence[Sequence[bool]], step: Step
) -> tuple[torch.Tensor, LearnerState]:
    outputs = []
    for batch, full in zip(_steps(views, learner, dual=step is dual_step), complete, strict=True):
        output, increments = step(batch, state, learner)
        state = _advance(state, increments, views.last_scale, full)
        outputs.append(output)
    return torch.stack(outputs, dim=2), state


def _steps(views: Views, learner: InnerLearner, dual: bool) -> list[StepViews]:
    target = views.value if learner.norm is None else views.value - views.key
    parts = [views.query, views.key, target, views.rate[..., None], views.scale[..., None]]
    if dual:
        length = views.key.shape[-2]
        causal_scale = views.scale[..., None].expand(*views.scale.shape, length).tril()
        parts += [(views.query @ views.key.mT + float(learner.learn_bias)) * causal_scale, causal_scale]
    return [StepViews(*batch) for batch in zip(*(part.unbind(2) for part in parts), strict=True)]


def dual_step(
    batch: StepViews, state: LearnerState, learner: InnerLearner
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One mini-batch without ever building W_t.

    Returns:
        f_res(q_t; W_t) [B, H, N, C], and what this mini-batch's tokens add to the sums.
    """
    layers = inner_gradients(batch.key, batch.target, batch.rate, state.weights, learner)
    y, increments = batch.query, []
    for index, (x, gradient) in enumerate(layers):
        weight, bias = state.weights[2 * index : 2 * index + 2]
        if index == 0:
            near = batch.near
        else:
            y = F.gelu(y, approximate="tanh")
            near = (y @ x.mT + float(learner.learn_bias)) * batch.causal_scale
        new = y @ weight + bias - near @ gradient
        if state.sums is not None:
            weight_sum, bias_sum = state.sums[2 * index : 2 * index + 2]
            new = new - (y @ weight_sum + bias_sum) * batch.scale
        increments += [x.mT @ gradient, gradient.sum(-2, keepdim=True) * float(learner.learn_bias)]
        y = new
    return y, tuple(increments)


def primal_step(
    batch: StepViews, state: LearnerState, learner: InnerLearner
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One mini-batch as the equations say it, with one copy of the weights per token: the reference for `dual_step`."""
    layers = inner_gradients(batch.key, batch.target, batch.rate, state.weights, learner)
    y, scale, increments = batch.query.unsqueeze(-2), batch.scale.unsqueeze(-1), []
    for index, (x, gradient) in enumerate(layers):
        if index > 0:
            y = F.gelu(y, approximate="tanh")
        # Per token [B, H, N, in, out] and [B, H, N, 1, out].
        of_weight = x.unsqueeze(-1) * gradient.unsqueeze(-2)
        of_bias = gradient.unsqueeze(-2) * float(learner.learn_bias)
        current = []
        for position, own in ((2 * index, of_weight), (2 * index + 1, of_bias)):
            running = own.cumsum(dim=2)
            increments.append(running[:, :, -1])
            if state.sums is not None:
                running = running + state.sums[position].unsqueeze(2)
            current.append(state.weights[position].unsqueeze(2) - scale * running)
        weight, bias = current
        y = y @ weight + bias
    return y.squeeze(-2), tuple(increments)


def inner_gradients(
    key: torch.Tensor, target: torch.Tensor, rate: torch.Tensor, weights: Sequence[torch.Tensor], learner: InnerLearner
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per inner layer its inputs x [B, H, N, in] and, times `rate`, the gradients [B, H, N, out] of its outputs.

    The gradient of token t with respect to the layer's weight is the outer product of the two, with respect to its
    bias the second.

    Args:
        key, target: [B, H, N, C]; target is v, less k where f adds its input.
        rate: [B, H, N, 1].
        weights: weight and bias of each inner layer.
    """
    inputs, outputs = [key], []
    for index in range(0, len(weights), 2):
        if index > 0:
            inputs.append(F.gelu(outputs[-1], approximate="tanh"))
        outputs.append(inputs[-1] @ weights[index] + weights[index + 1])
    gradients = [_loss_gradient(outputs[-1], target, learner) * rate]
    for index in range(len(outputs) - 2, -1, -1):
        of_input = gradients[0] @ weights[2 * index + 2].mT
        gradients.insert(0, torch.ops.aten.gelu_backward(of_input, outputs[index], approximate="tanh"))
    return list(zip(inputs, gradients, strict=True))


def _loss_gradient(output: torch.Tensor, target: torch.Tensor, learner: InnerLearner) -> torch.Tensor:
    """Gradient of 1/2 |LN(output) - target|^2, or without a LayerNorm of 1/2 |output - target|^2, [B, H, N, C]."""
    if learner.norm is None:
        return output - target
    weight, bias = learner.norm
    # The operators behind F.layer_norm and its backward pass: one kernel each, and differentiable once more.
    shape = output.shape[-1:]
    normal, mean, reciprocal_std = torch.native_layer_norm(output, shape, None, None, NORM_EPS)
    of_normal = (normal * weight + bias - target) * weight
    return torch.ops.aten.native_layer_norm_backward(
        of_normal, output, shape, mean, reciprocal_std, None, None, (True, False, False)
    )[0]


def _advance(
    state: LearnerState, increments: Sequence[torch.Tensor], last_scale: torch.Tensor, complete: Sequence[bool]
) -> LearnerState:
    """The state after a mini-batch's tokens: where it is full its last weights, and else its sums so far."""
    sums = increments
    if state.sums is not None:
        sums = [old + new for old, new in zip(state.sums, increments, strict=True)]
    if not any(complete):
        return LearnerState(state.weights, tuple(sums))
    weights = [start - last_scale * total for start, total in zip(state.weights, sums, strict=True)]
    if all(complete):
        return LearnerState(tuple(weights), None)
    full = torch.tensor(complete, device=last_scale.device).view(-1, 1, 1, 1)
    return LearnerState(
        tuple(torch.where(full, new, old) for new, old in zip(weights, state.weights, strict=True)),
        tuple(torch.where(full, torch.zeros_like(total), total) for total in sums),
    )


def rotation_angles(positions: torch.Tensor, channels: int, theta: float) -> torch.Tensor:
    """positions [...] -> RoPE angles [..., channels / 2], float64, on a device that has it."""
    device = float64_device(positions.device)
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    return positions[..., None].to(device).double() * theta**-exponents


def rotate_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn the channels (2i, 2i + 1) of x [B, H, G, N, C] by angles [1 or B, G, N, C / 2]."""
    cosines, sines = (turn.to(x.dtype).to(x.device).unsqueeze(1) for turn in (angles.cos(), angles.sin()))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1).flatten(-2)
