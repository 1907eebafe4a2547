"""Perplexity: how many tokens a model hesitates between, on average."""

import torch

from .loss_by_position import loss_by_position
from .subject import Subject, first_tokens


def perplexity(subject: Subject, documents: torch.Tensor, length: int, batch_size: int = 1) -> dict[str, float | int]:
    """Perplexity of the first `length` tokens of every document, each read once from its beginning.

    It counts tokens, not words, so that only models with the same tokenizer can be compared.

    Args:
        documents: token ids, int64 [documents, at least length]; no padding.
        length: tokens of each document, at least 2; all but the first are predicted.
        batch_size: documents read side by side.

    Returns:
        `loss` (mean over all predicted tokens, nats), `perplexity` (exp of it) and
        `tokens` (how many were predicted).

    Raises:
        ValueError: `length` is below 2, or the documents are shorter.
    """
    losses = loss_by_position(subject, first_tokens(documents, length), batch_size, description=subject.label)
    return perplexity_of_losses(losses)


def perplexity_of_losses(losses: torch.Tensor) -> dict[str, float | int]:
    """What `perplexity` returns, of losses [documents, tokens]."""
    loss = losses.double().mean()
    return {"loss": loss.item(), "perplexity": loss.exp().item(), "tokens": losses.numel()}
