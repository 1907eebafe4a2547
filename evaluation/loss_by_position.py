"""Loss by token position: what a model gains from the context before a token.

A model that uses its context gets better along the document; one that forgets stays level after its window.
"""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .subject import Subject, token_losses

BLOCK = 64  # positions whose mean is kept of every document


def loss_by_position(
    subject: Subject | PreTrainedModel,
    documents: torch.Tensor,
    batch_size: int,
    description: str = "Evaluating",
    **forward_arguments,
) -> torch.Tensor:
    """Negative log-likelihood of every token given all tokens before it, each document read once from its beginning.

    Args:
        subject: any causal language model of transformers, or a `Subject`.
        documents: token ids, int64 [documents, length]; no padding.
        batch_size: documents read side by side.
        description: shown at the progress bar.
        forward_arguments: passed to the model's forward, for example `test_time_training=False`; they come over
            those of the subject.

    Returns:
        Nats, float32 [documents, length - 1], on the CPU: column t is the loss of token t + 1.

    Raises:
        ValueError: `documents` is not [documents, length] with a length of at least 2, or has an id that the model
            does not know; `batch_size` is not positive.
    """
    if documents.ndim != 2 or not len(documents) or documents.shape[1] < 2:
        raise ValueError(f"documents: shape {list(documents.shape)}; must be [documents, length], length at least 2")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if isinstance(subject, Subject):
        subject = Subject(subject.label, subject.model, subject.tokenizer, subject.arguments | forward_arguments)
    else:
        subject = Subject(type(subject).__name__, subject, arguments=forward_arguments)
    losses = []
    with tqdm(total=documents[:, 1:].numel(), desc=description, unit=" tokens", unit_scale=True) as progress:
        for batch in documents.split(batch_size):
            losses.append(token_losses(subject, batch))
            progress.update(losses[-1].numel())
    return torch.cat(losses)


def means_of_positions(losses: torch.Tensor) -> dict[str, float | int | list]:
    """What is kept of losses by position, [documents, length - 1].

    Returns:
        `loss` (nats per token), `tokens` (how many were predicted), `loss_by_position` (means over documents) and
        `loss_by_block`, per document the mean of each `BLOCK` positions, the last of them perhaps fewer.
    """
    means = losses.double().mean(dim=0)
    blocks = [block.double().mean(dim=1) for block in losses.split(BLOCK, dim=1)]
    return {
        "loss": means.mean().item(),
        "tokens": losses.numel(),
        "loss_by_position": means.tolist(),
        "loss_by_block": torch.stack(blocks, dim=1).tolist(),
    }


def bucket_bounds(edges: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Buckets [start, end) between neighbouring edges, the last one up to `length`."""
    return list(zip(edges, [*edges[1:], length], strict=True))


def bucket_means(losses: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> list[float]:
    """Mean loss over all documents of the tokens at positions [start, end) of each bucket.

    Args:
        losses: [documents, length - 1] as `loss_by_position` returns; the token at position 0 is never predicted.
    """
    return [losses[:, max(start - 1, 0) : end - 1].mean().item() for start, end in bounds]
