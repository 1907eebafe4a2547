"""The loss of a language model token by token, without ever holding the logits of a long text."""

from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .twice_differentiable import at_least_float32

LOSS_SEGMENT = 1024  # positions whose logits are held at once
CACHED_LOGITS = 2**18  # that are worked on at once on a CPU
NO_TARGET = -100  # transformers' label for "do not predict"


def position_labels(
    labels: torch.Tensor | None, shift_labels: torch.Tensor | None, token_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """What each position's logits are compared with.

    Args:
        labels: [batch, length]; position t predicts label t + 1.
        shift_labels: [batch, length], already aligned with the positions; where both are given they agree.
        token_mask: [batch, length] bool, False at padding, which predicts nothing; None when nothing is padded.

    Returns:
        [batch, length - 1], or [batch, length] with `shift_labels`; None without either.
    """
    if shift_labels is None and labels is None:
        return None
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    return targets if token_mask is None else targets.masked_fill(~token_mask[:, : targets.shape[1]], NO_TARGET)


def plain_token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `token_nll` of one set of targets, in operations that autograd differentiates."""
    logits = logits.to(at_least_float32(logits.dtype))
    chosen = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (logits.logsumexp(dim=-1) - chosen).masked_fill(targets == NO_TARGET, 0.0)


def token_nll(logits: torch.Tensor, *targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """-log p(target), differentiable twice, without a copy of the logits in float32 or of their gradients.

    Args:
        logits: [B, T, V].
        targets: one or more sets [B, T].

    Returns:
        For each set [B, T], at least float32; 0 where the target is `NO_TARGET`.
    """
    flat = [own.to(logits.device).flatten() for own in targets]
    found = _TokenNLL.apply(logits.flatten(0, -2), *flat)
    return tuple(nll.view(own.shape) for nll, own in zip(found, targets, strict=True))


class _TokenNLL(torch.autograd.Function):
    """For logits z [N, V] with p = softmax(z) and n = -log p(t):   z_bar = n_bar (p - e_t)."""

    @staticmethod
    def forward(ctx, logits, *targets):
        wide = at_least_float32(logits.dtype)
        normalizer = torch.cat([logits[rows].to(wide).logsumexp(-1) for rows in _rows(logits)])
        ctx.save_for_backward(logits, normalizer, *targets)
        results = []
        for own in targets:
            chosen = logits.gather(1, own.clamp_min(0)[:, None])[:, 0]
            results.append((normalizer - chosen).masked_fill_(own == NO_TARGET, 0.0))
        return tuple(results)

    @staticmethod
    def backward(ctx, *bars):
        logits, normalizer, *targets = ctx.saved_tensors
        bars = [bar.masked_fill(own == NO_TARGET, 0.0) for bar, own in zip(bars, targets, strict=True)]
        return _TokenNLLGradient.apply(logits, normalizer, *targets, *bars), *(None for _ in targets)


class _TokenNLLGradient(torch.autograd.Function):
    """The first derivative of several sets of targets, with w the sum of their n_bar, and for its gradient a:

    of n_bar: m - a_t,   m = sum(a p);     of z: w p (a - m)
    """

    @staticmethod
    def forward(ctx, logits, normalizer, *targets_and_bars):
        half = len(targets_and_bars) // 2
        targets, bars = targets_and_bars[:half], targets_and_bars[half:]
        total = sum(bars)
        ctx.save_for_backward(logits, normalizer, total, *targets)
        result = torch.empty_like(logits)
        places = [own.clamp_min(0)[:, None] for own in targets]
        for rows in _rows(logits):
            part = _probabilities(logits[rows], normalizer[rows]).mul_(total[rows, None])
            for own, bar in zip(places, bars, strict=True):
                part.scatter_add_(1, own[rows], -bar[rows, None])
            result[rows] = part
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        logits, normalizer, total, *targets = ctx.saved_tensors
        of_logits, means = torch.empty_like(logits), torch.empty_like(normalizer)
        for rows in _rows(logits):
            probabilities, own = _probabilities(logits[rows], normalizer[rows]), gradient[rows].to(normalizer.dtype)
            means[rows] = torch.linalg.vecdot(probabilities, own)
            of_logits[rows] = (own - means[rows, None]).mul_(probabilities).mul_(total[rows, None])
        of_bars = [means - gradient.gather(1, own.clamp_min(0)[:, None])[:, 0] for own in targets]
        return of_logits, None, *(None for _ in targets), *of_bars


def _probabilities(logits: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
    return (logits - normalizer[:, None]).exp_()  # in the dtype of the normalizer


def _rows(logits: torch.Tensor) -> list[slice]:
    """Rows of [N, V] that are worked on at once: on a CPU few enough to stay in its cache."""
    size = max(1, (CACHED_LOGITS if logits.device.type == "cpu" else logits.numel()) // logits.shape[1])
    return [slice(begin, begin + size) for begin in range(0, max(len(logits), 1), size)]  # at least one, perhaps empty


def logits_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits [batch, length, vocabulary], labels [batch, length] -> -log p(label), at least float32, 0 at -100."""
    return token_nll(logits, labels)[0]


def hidden_nll(
    head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, checkpointing: bool, size: int = LOSS_SEGMENT
) -> torch.Tensor:
    """As `logits_nll`, from hidden states [batch, length, channels], segment by segment.

    Args:
        head: makes logits of hidden states.
        checkpointing: recompute the logits in the backward pass.
        size: positions whose logits are held at once.
    """

    def nll(part: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits_nll(head(part), targets)

    if checkpointing and torch.is_grad_enabled():
        nll = partial(checkpoint, nll, use_reentrant=False)
    parts = zip(hidden.split(size, dim=1), labels.split(size, dim=1), strict=True)
    return torch.cat([nll(part, targets) for part, targets in parts], dim=1)


def hidden_losses(
    head: nn.Module, hidden: torch.Tensor, logits: torch.Tensor | None, labels: torch.Tensor, checkpointing: bool
) -> torch.Tensor:
    """-log p(label) [batch, labels], from the logits where those of all positions are there.

    Args:
        hidden: [batch, length, size].
        logits: [batch, kept positions, vocabulary], or None.
        labels: [batch, at most length] for the first positions.
        checkpointing: as in `hidden_nll`.
    """
    length = labels.shape[1]
    if logits is not None and logits.shape[1] == hidden.shape[1]:
        return logits_nll(logits[:, :length], labels)
    return hidden_nll(head, hidden[:, :length], labels, checkpointing)


def mean_loss(nll: torch.Tensor, labels: torch.Tensor, num_items: int | torch.Tensor | None) -> torch.Tensor:
    """Sum of `nll` divided by `num_items` (default: labelled tokens); 0 where nothing is labelled."""
    if num_items is None:
        num_items = (labels != NO_TARGET).sum().clamp_min(1)
    return per_item(nll.sum(), num_items)


def per_item(total: torch.Tensor, num_items: int | torch.Tensor) -> torch.Tensor:
    """A summed loss divided by a number, wherever that is kept."""
    return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)
