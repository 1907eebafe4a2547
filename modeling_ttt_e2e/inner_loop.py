"""The inner loop: gradient descent on next-token loss, one step per mini-batch (arXiv 2512.23675, equations 5 and 6).

    loss_i(W) = sum(mask * nll) / max(sum(mask), 1)             over the tokens of mini-batch i of one sequence
    g         = d loss_i / dW  at W_i                           over all inner matrices of all suffix blocks
    W_(i+1)   = W_i - lr * clip(g),   clip(g) = g * min(1, max_norm / |g|)

`inner_step` is the one update rule of training, evaluation, prefill and decoding. It is pure: the mini-batch's inputs,
the keys and values so far and the fast weights go in; losses, new fast weights and new keys and values come out.
Everything is differentiable when grad mode is on, also g (second order) and the keys and values that are handed on.

Axis letters: B batch rows, T tokens of the mini-batch, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .causal_lm_loss import NO_TARGET, token_nll
from .context import gather_positions
from .fast_weights import FastWeights
from .sinks import Sinks
from .twice_differentiable import ClippedDescent, at_least_float32, is_asynchronous


@dataclass(frozen=True)
class UpdateRule:
    """How an inner gradient becomes a step.

    Attributes:
        learning_rate: step size, warm-up included.
        max_grad_norm: joint L2 norm to which the gradient of one sequence is clipped; 0 for no clipping.
        second_order: differentiate through the gradient when grad mode is on.
        horizon: cut the outer gradient every so many steps of a row within a call; None for never.
    """

    learning_rate: float
    max_grad_norm: float
    second_order: bool
    horizon: int | None


@dataclass(frozen=True)
class InnerState:
    """What one mini-batch hands to the next.

    Attributes:
        fast: fast weights with one copy per row, or None as long as nothing is learned.
        chunks: per inner attention layer, a tuple of chunks (keys, values) in order of time. Consecutive
            states share the chunks that did not change.
    """

    fast: FastWeights | None
    chunks: tuple[tuple[tuple[torch.Tensor, torch.Tensor], ...], ...]

    def tensors(self) -> list[torch.Tensor]:
        fast = [] if self.fast is None else list(self.fast.tensors)
        return fast + [tensor for layer in self.chunks for chunk in layer for tensor in chunk]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "InnerState":
        """The same structure holding `tensors`, in the order of `tensors()`."""
        given = iter(tensors)
        fast = self.fast
        if fast is not None:
            fast = replace(fast, tensors=tuple(next(given) for _ in fast.tensors))
        chunks = tuple(tuple((next(given), next(given)) for _ in layer) for layer in self.chunks)
        return InnerState(fast, chunks)

    def detach(self) -> "InnerState":
        return self.with_tensors([tensor.detach() for tensor in self.tensors()])

    def cut(self, rows: tuple[bool, ...]) -> "InnerState":
        """The same values, from which no outer gradient flows back in some rows."""
        return self.with_tensors([cut_gradient(tensor, rows) for tensor in self.tensors()])


@dataclass(frozen=True)
class MiniBatch:
    """One mini-batch of every row.

    Attributes:
        index: number of the mini-batch within the segment.
        tokens_read: per row, tokens before the mini-batch.
        inputs: [B, T, D], the hidden states that enter the inner loop.
        targets: [B, T] ids of the next tokens, `NO_TARGET` where there is none or it is masked.
        labels: [B, T] what the outer loss predicts, or None.
        position_embeddings: by layer type, cosines and sines of the RoPE angles, each
            [1 or B, 1, T, channels of a head].
        sinks: how sliding layers see their attention sinks; None where all of these are in every window.
        complete: which rows' mini-batch is full and has all its targets; the others report no inner loss.
        update: which rows take a step; a subset of `complete`.
        cut: the rows whose outer gradient ends behind this mini-batch (`UpdateRule.horizon`).
    """

    index: int
    tokens_read: tuple[int, ...]
    inputs: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor | None
    position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]]
    sinks: Sinks | None
    complete: tuple[bool, ...]
    update: tuple[bool, ...]
    cut: tuple[bool, ...]


@dataclass(frozen=True)
class StepOutput:
    """Attributes:
    hidden: [B, T, D] after the final norm, or None when nobody asked.
    label_nll: [B, T] negative log-likelihood of `labels` (0 where there is none), or None.
    inner_loss, inner_grad_norm: [B], detached; NaN where the row has no complete mini-batch or takes no step.
    layers: hidden states after each suffix block but the last, and after the final norm [B, T, D], when asked for.
    attentions: attention weights of the inner attention layers, when asked for.
    """

    hidden: torch.Tensor | None
    label_nll: torch.Tensor | None
    inner_loss: torch.Tensor
    inner_grad_norm: torch.Tensor
    layers: tuple[torch.Tensor, ...] = ()
    attentions: tuple[torch.Tensor, ...] = ()

    def differentiable(self) -> list[torch.Tensor]:
        optional = [self.hidden, self.label_nll, *self.layers, *self.attentions]
        return [tensor for tensor in optional if tensor is not None]

    def with_differentiable(self, tensors: Sequence[torch.Tensor]) -> "StepOutput":
        given = iter(tensors)
        return StepOutput(
            None if self.hidden is None else next(given),
            None if self.label_nll is None else next(given),
            self.inner_loss,
            self.inner_grad_norm,
            tuple(next(given) for _ in self.layers),
            tuple(next(given) for _ in self.attentions),
        )


def cut_gradient(tensor: torch.Tensor, rows: tuple[bool, ...]) -> torch.Tensor:
    """The same values [B, ...], from which no gradient flows back in some rows."""
    if all(rows):
        return tensor.detach()
    if not any(rows) or not tensor.requires_grad:
        return tensor
    chosen = torch.tensor(rows, device=tensor.device).view(-1, *[1] * (tensor.dim() - 1))
    return torch.where(chosen, tensor.detach(), tensor)


def row_losses(nll: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over each row's targets: [B, T] -> [B]; 0 for a row without any."""
    return nll.sum(dim=1) / (targets != NO_TARGET).sum(dim=1).clamp_min(1)


def descend(
    fast: FastWeights, gradients: Sequence[torch.Tensor], update: tuple[bool, ...], rule: UpdateRule
) -> tuple[FastWeights, torch.Tensor]:
    """One clipped step of gradient descent for the rows in `update`.

    A row whose gradient is not finite keeps its fast weights.

    Returns:
        The new fast weights and the gradient's norm per row before clipping, [B].
    """
    # W - lr * min(1, max_norm / |g|) * g; the readable twin is `clipped_descent`.
    *new, norms = ClippedDescent.apply(rule.learning_rate, rule.max_grad_norm, *fast.tensors, *gradients)
    moves = norms.isfinite()
    if not all(update):
        moves = moves & torch.tensor(update, device=moves.device)
    # Where a look would wait for the device, the choice is made there.
    if is_asynchronous(moves) or not bool(moves.all()):
        new = [
            torch.where(moves.to(own.device)[:, None, None], own, old)
            for own, old in zip(new, fast.tensors, strict=True)
        ]
    return replace(fast, tensors=tuple(new)), norms


def inner_step(
    suffix: Callable, state: InnerState, batch: MiniBatch, rule: UpdateRule
) -> tuple[InnerState, StepOutput]:
    """Read one mini-batch under the fast weights `state.fast`, then move those by one gradient step.

    Args:
        suffix: the model from the inner inputs to the logits, `suffix(batch, fast, chunks, with_logits) ->
            (StepOutput without losses, new chunks, logits)`.

    Returns:
        The state for the next mini-batch, and the outputs under the weights before the step.
    """
    differentiable = torch.is_grad_enabled()
    learns = any(batch.update)
    needs_logits = any(batch.complete) or batch.labels is not None
    fast = state.fast
    with torch.enable_grad() if learns else torch.set_grad_enabled(differentiable):
        if learns:
            # With an outer gradient to come, the fast weights stay in its graph; without one they are its leaves.
            leaves = (t if differentiable and t.requires_grad else t.detach().requires_grad_() for t in fast.tensors)
            fast = replace(fast, tensors=tuple(leaves))
        output, chunks, logits = suffix(batch, fast, state.chunks, needs_logits)
        label_nll, losses = None, None
        if needs_logits:
            labels = [] if batch.labels is None else [batch.labels]
            found = token_nll(logits, *labels, *([batch.targets] if any(batch.complete) else []))
            if batch.labels is not None:
                label_nll = found[0]
            if any(batch.complete):
                losses = row_losses(found[-1], batch.targets)
        if learns:
            second_order = differentiable and rule.second_order
            wanted = losses
            if not all(batch.update):
                wanted = losses.masked_fill(~torch.tensor(batch.update, device=losses.device), 0.0)
            gradients = torch.autograd.grad(
                wanted.sum(),
                fast.tensors,
                create_graph=second_order,
                retain_graph=differentiable,
            )
    norms = None
    if learns:
        with torch.set_grad_enabled(differentiable):
            fast, norms = descend(fast, gradients, batch.update, rule)
    output = StepOutput(
        hidden=output.hidden,
        label_nll=label_nll,
        inner_loss=_where(batch.complete, losses, batch.inputs),
        inner_grad_norm=_where(batch.update, norms, batch.inputs),
        layers=output.layers,
        attentions=output.attentions,
    )
    state = InnerState(fast, chunks)
    if differentiable:
        return state, output
    return state.detach(), output.with_differentiable([tensor.detach() for tensor in output.differentiable()])


def _where(rows: tuple[bool, ...], values: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    missing = like.new_full((len(rows),), float("nan"), dtype=at_least_float32(like.dtype))
    if values is None:
        return missing
    # NaN says "none here", so what is not a number is reported as infinite.
    values = values.detach().to(like.device).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return torch.where(torch.tensor(rows, device=like.device), values.to(missing.dtype), missing)


def run_inner_loop(
    suffix: Callable, state: InnerState, batches: Sequence[MiniBatch], rule: UpdateRule
) -> tuple[InnerState, list[StepOutput]]:
    """`inner_step` for one mini-batch after the other."""
    outputs = []
    for batch in batches:
        state, output = inner_step(suffix, state, batch, rule)
        if any(batch.cut):
            state = state.cut(batch.cut)
        outputs.append(output)
    return state, outputs


def inner_table(
    records: Sequence[tuple[tuple[int, ...], tuple[bool, ...], torch.Tensor, torch.Tensor]],
    rows: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inner losses and gradient norms of a call, each [rows, mini-batches], NaN where a row has fewer.

    Args:
        records: in order of time (rows, which of them have a complete mini-batch, losses, norms).
    """
    if not records:
        return torch.empty(rows, 0, device=device), torch.empty(rows, 0, device=device)
    everyone = tuple(range(rows))
    entries, lengths = [], [0] * rows
    for members, complete, losses, norms in records:
        for row, own in zip(members, complete, strict=True):
            lengths[row] += own
        both = torch.stack([losses, norms], dim=-1)  # [members, 2]
        if members != everyone:
            full = both.new_full((rows, 2), float("nan"))
            both = full.index_copy(0, torch.tensor(members, device=both.device), both)
        entries.append(both)
    table = torch.stack(entries, dim=1)  # [rows, records, 2]
    # Rows that learned at different times stand at different places: move every row's own entries to the left.
    if min(lengths) < len(records):
        order = table[..., 0].isnan().long().argsort(dim=1, stable=True)
        table = gather_positions(table, order)[:, : max(lengths)]
    return table[..., 0], table[..., 1]
