"""The loss of a language model token by token, without ever holding the logits of a long text."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .checks import check_label_arguments, check_number_of_items

LOSS_SEGMENT = 1024  # positions whose logits are held at once
IGNORED = -100  # transformers' label for "do not predict"


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
    labels: torch.Tensor | None, shift_labels: torch.Tensor | None, real: torch.Tensor | None
) -> torch.Tensor | None:
    """What each position's logits are compared with.

    Args:
        labels: [batch, length]; position t predicts label t + 1.
        shift_labels: [batch, length], already aligned with the positions; where both are given they agree.
        real: [batch, length] bool, False at padding, which predicts nothing; None when nothing is padded.

    Returns:
        [batch, length - 1], or [batch, length] with `shift_labels`; None without either.
    """
    if shift_labels is None and labels is None:
        return None
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    return targets if real is None else targets.masked_fill(~real[:, : targets.shape[1]], IGNORED)


def logits_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits [batch, length, vocabulary], labels [batch, length] -> -log p(label), at least float32, 0 at -100."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.mT, labels.to(logits.device), ignore_index=IGNORED, reduction="none")


def hidden_nll(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """As `logits_nll`, from hidden states [batch, length, size], segment by segment.

    Args:
        head: makes logits of hidden states.
        checkpointing: recompute the logits in the backward pass.
    """

    def nll(part: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits_nll(head(part), targets)

    if checkpointing and torch.is_grad_enabled():
        nll = partial(checkpoint, nll, use_reentrant=False)
    parts = zip(hidden.split(LOSS_SEGMENT, dim=1), labels.split(LOSS_SEGMENT, dim=1), strict=True)
    return torch.cat([nll(part, targets) for part, targets in parts], dim=1)


def token_losses(
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
        num_items = (labels != IGNORED).sum().clamp_min(1)
    return nll.sum() / (num_items.to(nll.device) if torch.is_tensor(num_items) else num_items)
