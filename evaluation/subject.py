"""What is evaluated: a causal language model with a name, and the loss of every token under it."""

import inspect
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Positions whose logits exist at once, over all rows, and the most entries that these logits may have (1 GiB).
SEGMENT_TOKENS, SEGMENT_LOGITS = 2048, 2**28


@dataclass(frozen=True)
class Subject:
    """A causal language model under evaluation.

    Attributes:
        label: for tables and pictures.
        model: any causal language model of transformers; it is set to evaluation mode.
        tokenizer: or None.
        arguments: passed to the model's forward, for example `{"test_time_training": False}`.
        split_special_tokens: special tokens that a text spells out, such as `<|end|>`, are read as these letters.
    """

    label: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    arguments: dict = field(default_factory=dict)
    split_special_tokens: bool = True

    def __post_init__(self):
        self.model.eval()

    @property
    def vocabulary_size(self) -> int:
        """Ids that the model can read."""
        return self.model.config.get_text_config().vocab_size


@torch.no_grad()
def token_losses(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token given all tokens before it in its row.

    Logits exist for one segment of the text at a time, so that memory does not grow with them: a model that learns
    while it reads takes care of that itself, any other model reads in segments with its cache. Only a model whose
    forward returns no `cache` has to read everything at once.

    Args:
        ids: int64 [rows, length], length at least 2, no padding; on any device.

    Returns:
        Nats, float32 [rows, length - 1], on the CPU: column t is the loss of token t + 1.

    Raises:
        ValueError: `ids` has another shape, an id outside the vocabulary, or more positions than the model has.
    """
    _check_ids(subject, ids)
    model, arguments = subject.model, subject.arguments
    ids = ids.to(model.device)
    if "test_time_training" in inspect.signature(model.forward).parameters:
        output = model(ids, labels=ids, use_cache=False, skip_logits=True, **arguments)
        return output.token_nll.float().cpu()
    size = max(1, min(SEGMENT_TOKENS, SEGMENT_LOGITS // subject.vocabulary_size) // len(ids))
    if ids.shape[1] - 1 > size and "cache" in inspect.signature(model.forward).parameters:
        losses = _read_in_segments(subject, ids, size)
        if losses is not None:
            return losses
    logits = model(ids, return_dict=True, **arguments).logits[:, :-1]
    return _cross_entropy(logits, ids[:, 1:], size)


def first_tokens(documents: torch.Tensor, length: int, least: int = 2) -> torch.Tensor:
    """The first `length` tokens of every document.

    Args:
        documents: token ids, int64 [documents, at least length].
        least: the smallest length that makes sense.

    Raises:
        ValueError: `length` is below `least`, or the documents are shorter; nothing to read.
    """
    if length < least:
        raise ValueError(f"length={length}: must be at least {least}")
    if documents.ndim != 2 or not len(documents) or documents.shape[1] < length:
        raise ValueError(
            f"documents: shape {list(documents.shape)}, but length={length}: must be [documents, length], one document "
            "at least, all of that length; give longer documents or a smaller length"
        )
    return documents[:, :length]


def check_longest_text(model: PreTrainedModel, length: int) -> None:
    """Refuse texts that are longer than a model's table of learned positions (GPT-2, OPT).

    Models with rotary positions read on, whatever their configuration says.

    Raises:
        ValueError: such a model, and more tokens than its table has positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    tables = (name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    learned = any("pos" in name or name.endswith("wpe") for name in tables)
    if learned and limit is not None and length > limit:
        raise ValueError(
            f"length={length}: {type(model).__name__} has a learned position for only {limit} tokens; give a smaller "
            "length"
        )


def _read_in_segments(subject: Subject, ids: torch.Tensor, size: int) -> torch.Tensor | None:
    """The losses, read `size` columns at a time; None when the model gives back no cache."""
    losses, cache = [], None
    inputs, targets = ids[:, :-1].split(size, dim=1), ids[:, 1:].split(size, dim=1)
    for piece, expected in zip(inputs, targets, strict=True):
        output = subject.model(piece, cache=cache, use_cache=True, return_dict=True, **subject.arguments)
        cache = getattr(output, "cache", None)
        if cache is None:
            return None
        losses.append(_cross_entropy(output.logits, expected, size))
    return torch.cat(losses, dim=1)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
    """logits [rows, length, vocabulary], targets [rows, length] -> float32 on the CPU, `size` columns at a time."""
    pieces = zip(logits.split(size, dim=1), targets.split(size, dim=1), strict=True)
    losses = [
        nn.functional.cross_entropy(part.float().mT, ids.to(part.device), reduction="none") for part, ids in pieces
    ]
    return torch.cat(losses, dim=1).cpu()


def _check_ids(subject: Subject, ids: torch.Tensor) -> None:
    if ids.ndim != 2 or not len(ids) or ids.shape[1] < 2:
        raise ValueError(f"ids: shape {list(ids.shape)}; must be [rows, length], length at least 2")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= subject.vocabulary_size:
        raise ValueError(
            f"ids: between {low} and {high}, but {subject.label!r} knows 0 to {subject.vocabulary_size - 1}; tokenize "
            "the text with the model's own tokenizer"
        )
    check_longest_text(subject.model, ids.shape[1])
