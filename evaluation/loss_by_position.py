"""Loss by token position: what a model gains from the context before a token.

A model that uses its context gets better along the document; one that forgets stays level after its window.
"""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@torch.no_grad()
def loss_by_position(
    model: PreTrainedModel,
    documents: torch.Tensor,
    batch_size: int,
    description: str = "Evaluating",
    **forward_arguments,
) -> torch.Tensor:
    """Negative log-likelihood of every token given all tokens before it, each document read once from its beginning.

    Args:
        model: a TTT-E2E model, or a baseline of the same class.
        documents: token ids, int64 [documents, length]; no padding.
        batch_size: documents read side by side.
        description: shown at the progress bar.
        forward_arguments: passed to the model's forward, for example `test_time_training=False`.

    Returns:
        Nats, float32 [documents, length - 1], on the CPU: column t is the loss of token t + 1.

    Raises:
        ValueError: `documents` is not [documents, length] with a length of at least 2.
    """
    if documents.ndim != 2 or documents.shape[1] < 2:
        raise ValueError(f"documents: shape {list(documents.shape)}; must be [documents, length], length at least 2")
    model.eval()
    losses = []
    with tqdm(total=documents[:, 1:].numel(), desc=description, unit=" tokens", unit_scale=True) as progress:
        for batch in documents.split(batch_size):
            batch = batch.to(model.device)
            output = model(batch, labels=batch, use_cache=False, skip_logits=True, **forward_arguments)
            losses.append(output.token_nll.float().cpu())
            progress.update(losses[-1].numel())
    return torch.cat(losses)


def bucket_bounds(edges: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Buckets [start, end) between neighbouring edges, the last one up to `length`."""
    return list(zip(edges, [*edges[1:], length], strict=True))


def bucket_means(losses: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> list[float]:
    """Mean loss over all documents of the tokens at positions [start, end) of each bucket.

    Args:
        losses: [documents, length - 1] as `loss_by_position` returns; the token at position 0 is never predicted.
    """
    return [losses[:, max(start - 1, 0) : end - 1].mean().item() for start, end in bounds]
