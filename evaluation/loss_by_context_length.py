"""Loss against context length (arXiv 2512.23675, Figures 1 left and 9): does a longer context keep helping?"""

import torch

from .loss_by_position import loss_by_position
from .subject import Subject, first_tokens


def loss_by_context_length(
    subject: Subject, documents: torch.Tensor, length: int, batch_size: int = 1
) -> dict[str, float | int | list[float] | None]:
    """Mean loss over all tokens of the first `length` tokens of every document.

    Systems are comparable when they read the same documents; their difference is best taken document by document,
    because documents differ far more from one another than systems do.

    Args:
        documents: token ids, int64 [documents, at least length]; no padding.
        length: tokens of context, at least 2.
        batch_size: documents read side by side.

    Returns:
        `loss` (nats per token), `standard_error` of it over documents (None for a single one), `tokens` (how many
        were predicted) and `loss_by_document`, the mean of each, in their order.

    Raises:
        ValueError: `length` is below 2, or the documents are shorter.
    """
    losses = loss_by_position(subject, first_tokens(documents, length), batch_size, description=subject.label)
    return means_of_documents(losses)


def means_of_documents(losses: torch.Tensor) -> dict[str, float | int | list[float] | None]:
    """What `loss_by_context_length` returns, of losses [documents, tokens]."""
    means = losses.double().mean(dim=1)
    error = None if len(means) < 2 else (means.std() / len(means) ** 0.5).item()
    return {
        "loss": means.mean().item(),
        "standard_error": error,
        "tokens": losses.numel(),
        "loss_by_document": means.tolist(),
    }
