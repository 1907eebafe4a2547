"""The loss of a language model token by token, without ever holding the logits of a long text."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .checks import check_label_arguments, check_number_of_items
from .twice_differentiable import at_least_float32

LOSS_SEGMENT = 1024  # positions whose logits are held at once
NO_TARGET = -100  # transformers' label for "do not predict"


def check_loss_arguments(
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    num_items: int | torch.Tensor | None,
    shape: tuple[int, int],
    vocab_size: int,
) -> None:
    """Check what the loss of a language model is made from.

    Args:
        shape: of the inputs, (batch, length).

    Raises:
        ValueError, TypeError: naming the argument, its value and the remedy.
    """
    check_number_of_items(num_items)
    check_label_arguments(labels, shift_labels, shape, vocab_size)


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


def log_likelihood_loss(logits: torch.Tensor, targets: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
    """-log p(target) [B, T], 0 where the target is `NO_TARGET`.

    Args:
        logits: [B, T, V], at least float32.
        targets: [B, T].
        normalizer: log of the sum of exp(logits), [B, T].
    """
    chosen = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (normalizer - chosen).masked_fill(targets == NO_TARGET, 0.0)


def widened(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in at least float32, and the logarithm of their exponentials' sum."""
    logits = logits.to(at_least_float32(logits.dtype))
    return logits, logits.logsumexp(dim=-1)


def logits_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits [batch, length, vocabulary], labels [batch, length] -> -log p(label), at least float32, 0 at -100."""
    logits, normalizer = widened(logits)
    return log_likelihood_loss(logits, labels.to(logits.device), normalizer)


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
