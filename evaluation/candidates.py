"""The models of an evaluation, found and checked before the first of them is loaded."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed

from ..data.tokenizer import load_tokenizer, tokenizer_digest
from ..storage.digests import digest
from ..training.models import ModelSource, find_model
from .results import folder_digest
from .subject import Subject, check_can_learn, default_label, load_subject, split_spec
from .tasks import Task

SEED = 0  # of the weights of a preset
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Candidate:
    """A model that is going to be measured, not loaded yet; `tokenizer` is None where it has none and needs none."""

    label: str
    spec: str
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase | None

    def digest(self) -> str:
        """SHA-256 of all that decides its numbers: weights, configuration, tokenizer, and whether it learns."""
        folder = self.source.folder
        if folder is None:
            weights = digest([self.source.fields, SEED])
        elif Path(folder).is_dir():
            weights = folder_digest(Path(folder))
        else:  # on the Hub, where a commit names the contents
            weights = digest([folder, AutoConfig.from_pretrained(folder)._commit_hash])
        tokenizer = None if self.tokenizer is None else tokenizer_digest(self.tokenizer)
        return digest([weights, tokenizer, split_spec(self.spec)[1]])


def load_candidate(candidate: Candidate, dtype: str, split_special_tokens: bool = True) -> Subject:
    """The model itself; the weights of a preset are random, but always the same."""
    set_seed(SEED)
    subject = load_subject(candidate.spec, candidate.label, dtype=DTYPES[dtype])
    return dataclasses.replace(subject, tokenizer=candidate.tokenizer, split_special_tokens=split_special_tokens)


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
    name, learning = split_spec(spec)
    source = find_model(name)
    if learning is not None:
        check_can_learn(source.config_class.from_dict(source.fields), spec, name)
    label = label or default_label(name, learning)
    return Candidate(label, spec, source, find_tokenizer(spec, source, tokenizer) if needs_tokenizer else None)


def find_tokenizer(spec: str, source: ModelSource, tokenizer: str | None) -> PreTrainedTokenizerBase:
    """A model's own tokenizer, or the one named for models without.

    Raises:
        ValueError: there is neither.
    """
    if source.folder is not None:
        try:
            return load_tokenizer(source.folder)
        except FileNotFoundError:
            pass
    if tokenizer is None:
        raise ValueError(
            f"model={spec!r} has no tokenizer, and this task reads text: save one into its folder, or name one with "
            "--tokenizer"
        )
    return load_tokenizer(tokenizer)


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
