"""Two learned contexts side by side."""

from dataclasses import dataclass

import torch

from .. import TTTE2ECache
from ..serving import StoredContext, TextModel

LONGEST_PASSAGE = 2048  # tokens


@dataclass(frozen=True)
class Comparison:
    """What two contexts of one model have learned.

    Attributes:
        lengths: the norm of what each has learned: the distance of its fast weights from the weights of the model.
        cosine: between the two distances: 1 in the same direction, 0 nothing in common; None where one has learned
            nothing.
        losses: of a passage, nats per token: after nothing, after the first and after the second context; None without
            a passage. Nothing is learned from it.
        passage_tokens: how many tokens of it were read.
    """

    lengths: tuple[float, float]
    cosine: float | None
    losses: tuple[float, float, float] | None
    passage_tokens: int


@torch.no_grad()
def compare_contexts(
    text_model: TextModel, first: StoredContext, second: StoredContext, passage: torch.Tensor | None = None
) -> Comparison:
    """Compare two contexts, which stay as they are.

    Args:
        passage: ids of a text, int64 [tokens]; the first `LONGEST_PASSAGE` are read.

    Raises:
        ValueError: the passage has fewer than two tokens.
    """
    one, other = _learned(first.cache), _learned(second.cache)
    lengths = (float(one.norm()), float(other.norm()))
    cosine = float(one @ other) / (lengths[0] * lengths[1]) if all(lengths) else None
    losses, count = None, 0
    if passage is not None:
        passage = passage[:LONGEST_PASSAGE]
        count = len(passage)
        if count < 2:
            raise ValueError("The passage to compare on is too short: give some lines of text, or none")
        nothing = StoredContext.new(text_model.model)
        a, b, c = (_loss(text_model, context, passage) for context in (nothing, first, second))
        losses = (a, b, c)
    return Comparison(lengths, cosine, losses, count)


def _learned(cache: TTTE2ECache) -> torch.Tensor:
    """All differences between fast and slow weights, float64 [numbers]; empty ones are zero."""
    if not cache.has_learned:
        return torch.zeros(1, dtype=torch.float64)
    return torch.cat([tensor.flatten().double() for tensor in cache.context.fast.tensors])


def _loss(text_model: TextModel, context: StoredContext, passage: torch.Tensor) -> float:
    ids = passage[None].to(text_model.model.device)
    cache = context.cache.fork()
    output = text_model.model(ids, labels=ids, cache=cache, use_cache=True, skip_logits=True, learning_span=(0, 0))
    return float(output.token_nll.double().mean())
