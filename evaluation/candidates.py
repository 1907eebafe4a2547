"""The models of an evaluation, found and checked before the first of them is loaded."""

import dataclasses
import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from ..data.tokenizer import find_tokenizer, tokenizer_digest
from ..loading import ModelSource, find_model, load_model, model_label, on_device
from ..storage.digests import digest
from ..storage.dtypes import dtype_named
from .results import folder_digest
from .subject import Subject
from .tasks import Task

SEED = 0  # of the weights of a preset
LEARNING = {"learning-on": True, "learning-off": False}


@dataclass(frozen=True)
class Candidate(ModelSource):
    """A model that is going to be measured, and is not loaded yet.

    Attributes:
        label: for tables and pictures.
        spec: as it was asked for.
        learning: whether it learns while it reads; None leaves that to its configuration.
        tokenizer: None where it has none and needs none.
    """

    label: str
    spec: str
    learning: bool | None
    tokenizer: PreTrainedTokenizerBase | None

    def digest(self) -> str:
        """SHA-256 of all that decides its numbers: weights, configuration, tokenizer, and whether it learns."""
        if self.folder is None:
            weights = digest([self.fields, SEED])
        elif Path(self.folder).is_dir():
            weights = folder_digest(Path(self.folder))
        else:  # on the Hub, where a commit names the contents
            weights = digest([self.folder, AutoConfig.from_pretrained(self.folder)._commit_hash])
        tokenizer = None if self.tokenizer is None else tokenizer_digest(self.tokenizer)
        return digest([weights, tokenizer, self.learning])


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
    candidate = _found(spec, label)
    if candidate.folder is not None:
        candidate = dataclasses.replace(candidate, tokenizer=find_tokenizer(candidate.folder))
    return _loaded(candidate, dtype, device)


def load_candidate(candidate: Candidate, dtype: str, split_special_tokens: bool = True) -> Subject:
    """The model itself; the weights of a preset are random, but always the same."""
    set_seed(SEED)
    return _loaded(candidate, dtype_named(dtype), split_special_tokens=split_special_tokens)


def _loaded(
    candidate: Candidate,
    dtype: torch.dtype | None,
    device: torch.device | str | None = None,
    split_special_tokens: bool = True,
) -> Subject:
    model = load_model(candidate, dtype=dtype)
    return Subject(
        label=candidate.label,
        model=on_device(model, device),
        tokenizer=candidate.tokenizer,
        arguments={} if candidate.learning is None else {"test_time_training": candidate.learning},
        split_special_tokens=split_special_tokens,
    )


def _found(spec: str, label: str | None) -> Candidate:
    """A model without a tokenizer."""
    name, learning = split_spec(spec)
    source = find_model(name)
    if learning is not None:
        _check_can_learn(source.config, spec, name)
    return Candidate(
        **vars(source), label=label or default_label(name, learning), spec=spec, learning=learning, tokenizer=None
    )


def find_candidates(models: Sequence[str], tokenizer: str | None, task: Task) -> list[Candidate]:
    """The models of an evaluation.

    Args:
        models: each "SPEC" or "LABEL=SPEC".
        tokenizer: for those that have none of their own.

    Raises:
        ValueError: there is none, one does not exist or cannot do what its spec says, two labels are equal, or one
            has no tokenizer, or another one than the first, where that matters.
    """
    if not models:
        raise ValueError("--model is missing: name at least one, as in --model runs/mine")
    candidates = [find_candidate(text, tokenizer, task.needs_tokenizer) for text in models]
    label, times = Counter(candidate.label for candidate in candidates).most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"--model: {times} models have the label {label!r}; give each its own, as in --model "
            f"'first={candidates[0].spec}'"
        )
    if task.needs_data and not task.own_tokens:
        check_same_tokenizer(candidates)
    return candidates


def find_candidate(text: str, tokenizer: str | None, needs_tokenizer: bool) -> Candidate:
    """A model from "SPEC" or "LABEL=SPEC".

    Args:
        tokenizer: for a model that has none of its own.
    """
    label, separator, spec = text.partition("=")
    if not separator or Path(text).expanduser().exists():
        label, spec = None, text
    if label == "" or not spec:
        raise ValueError(f"--model {text!r}: must be SPEC or LABEL=SPEC, as in --model mine=runs/mine")
    candidate = _found(spec, label)
    return with_tokenizer(candidate, tokenizer) if needs_tokenizer else candidate


def with_tokenizer(candidate: Candidate, tokenizer: str | None) -> Candidate:
    """A model with its own tokenizer, or else the one that is named for models without.

    Raises:
        ValueError: there is neither.
    """
    sources = [source for source in (candidate.folder, tokenizer) if source is not None]
    found = find_tokenizer(*sources)
    if found is None:
        raise ValueError(
            f"model={candidate.spec!r} has no tokenizer, and this task reads text: save one into its folder, or name "
            "one with --tokenizer"
        )
    return dataclasses.replace(candidate, tokenizer=found)


def find_judge(judge: str | None, tokenizer: str | None, task: Task) -> Candidate | None:
    """The model that scores what others write, where the task has one.

    Raises:
        ValueError: it is missing, or named for a task that has none.
    """
    if not task.needs_judge:
        if judge is not None:
            raise ValueError(f"--judge: the task {task.name!r} has no judge; leave it out")
        return None
    if judge is None:
        raise ValueError(f"--judge is missing: the task {task.name!r} needs a model that scores what the others write")
    return find_candidate(judge, tokenizer, needs_tokenizer=True)


def check_same_tokenizer(candidates: Sequence[Candidate]) -> None:
    """Check that losses per token can be compared.

    Raises:
        ValueError: two models cut a text into different tokens.
    """
    first, *others = candidates
    expected = tokenizer_digest(first.tokenizer)
    for other in others:
        if tokenizer_digest(other.tokenizer) != expected:
            raise ValueError(
                f"--model: {other.label!r} has another tokenizer than {first.label!r}, so that their losses per token "
                "cannot be compared; compare them by the task bits-per-byte, or evaluate them in separate folders"
            )


def split_spec(spec: str) -> tuple[str, bool | None]:
    """`spec` without its suffix, and whether the suffix says to learn; None without one."""
    name, separator, suffix = spec.rpartition("@")
    if not separator or Path(spec).expanduser().exists():
        return spec, None
    if suffix not in LEARNING:
        nearest = difflib.get_close_matches(suffix, LEARNING, n=1, cutoff=0.0)[0]
        raise ValueError(f"spec={spec!r}: unknown suffix '@{suffix}'; did you mean '@{nearest}'?")
    return name, LEARNING[suffix]


def default_label(name: str, learning: bool | None) -> str:
    return model_label(name) if learning is None else f"{model_label(name)}, learning {'on' if learning else 'off'}"


def _check_can_learn(config: PreTrainedConfig, spec: str, name: str) -> None:
    remedy = f"leave the suffix out, as in {name!r}"
    if not hasattr(config, "check_can_learn"):
        raise ValueError(f"spec={spec!r}: a {config.model_type} model has no test-time training; {remedy}")
    try:
        config.check_can_learn()
    except ValueError as error:
        raise ValueError(f"spec={spec!r}: this model has no test-time training ({error}); {remedy}") from error
