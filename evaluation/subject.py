"""What is evaluated: a causal language model with a name, and the loss of every token under it."""

import difflib
import inspect
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

LEARNING = {"learning-on": True, "learning-off": False}
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


def load_subject(
    spec: str,
    label: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Subject:
    """Load a model, and its tokenizer where there is one.

    Args:
        spec: a folder with a saved model, the folder of a run of `ttt-e2e train`, an id of the Hub, or a preset or
            YAML file (random weights, enough to measure latency). `@learning-on` or `@learning-off` behind it says
            whether the model learns while it reads; without it the model's configuration does.
        label: for tables and pictures (default: the name in `spec`).
        device: default: CUDA where there is one.
        dtype: of the weights (default: as they were saved; float32 for random ones).

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: nothing that can be loaded, an unknown suffix, or one for a model that cannot learn.
    """
    from ..training.models import find_model  # brings the data libraries, which only loading needs

    name, learning = split_spec(spec)
    source = find_model(name)
    config = source.config_class.from_dict(source.fields)
    if learning is not None:
        check_can_learn(config, spec, name)
    if source.folder is None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype or "auto")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Subject(
        label=label or default_label(name, learning),
        model=model.to(device),
        tokenizer=None if source.folder is None else _tokenizer_of(source.folder),
        arguments={} if learning is None else {"test_time_training": learning},
    )


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


def check_positions(model: PreTrainedModel, length: int) -> None:
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
    check_positions(subject.model, ids.shape[1])


def split_spec(spec: str) -> tuple[str, bool | None]:
    """`spec` without its suffix, and whether the suffix says to learn; None without one."""
    name, separator, suffix = spec.rpartition("@")
    if not separator or Path(spec).expanduser().exists():
        return spec, None
    if suffix not in LEARNING:
        nearest = difflib.get_close_matches(suffix, LEARNING, n=1, cutoff=0.0)[0]
        raise ValueError(f"spec={spec!r}: unknown suffix '@{suffix}'; did you mean '@{nearest}'?")
    return name, LEARNING[suffix]


def check_can_learn(config: PreTrainedConfig, spec: str, name: str) -> None:
    remedy = f"leave the suffix out, as in {name!r}"
    if not hasattr(config, "check_can_learn"):
        raise ValueError(f"spec={spec!r}: a {config.model_type} model has no test-time training; {remedy}")
    try:
        config.check_can_learn()
    except ValueError as error:
        raise ValueError(f"spec={spec!r}: this model has no test-time training ({error}); {remedy}") from error


def default_label(name: str, learning: bool | None) -> str:
    path = Path(name)
    # In the folder of a run the model lies in `model/`, which says nothing.
    label = path.parent.name if path.name == "model" and path.parent.name else path.name
    return label if learning is None else f"{label}, learning {'on' if learning else 'off'}"


def _tokenizer_of(folder: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved beside a model; None where there is none."""
    from ..data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        return None
    except ValueError as error:
        if Path(folder).is_dir():
            raise
        logger.warning(f"{folder}: evaluated without a tokenizer ({error})")
        return None
