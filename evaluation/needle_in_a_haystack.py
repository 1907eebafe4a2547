"""Needle in a haystack: does a model still know one sentence of a long text? (arXiv 2512.23675, Table 2)"""

import copy
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..data.needles import NeedlePrompt, needle_prompts
from ..data.tokenizer import encode_texts
from .subject import Subject, check_longest_text, token_losses

DEPTH_BUCKETS = 5


def needle_in_a_haystack(
    subject: Subject,
    task: int,
    length: int,
    samples: int,
    seed: int,
    haystack: Sequence[str] | None = None,
    *,
    depth: float | None = None,
    distractors: int = 9,
    answer_tokens: int = 128,
    batch_size: int = 8,
) -> dict[str, float | list[float]]:
    """A single-needle task of RULER, scored by what the model writes and by what it holds more likely.

    Writing the value is too much for a small model, so that its accuracy is 0 even where it remembers; there the
    likelihood of the right value against wrong ones of the same kind tells more.

    Args:
        subject: with a tokenizer.
        task: 1 repeated noise sentences and a 7-digit number, 2 a text and a number, 3 a text and a UUID.
        length: tokens at most, prompt and answer together.
        samples: how many prompts.
        seed: of keys, values and places in the haystack.
        haystack: documents for tasks 2 and 3; None takes `documentation_texts()`, `ruler_essays()` are RULER's own.
        depth: of the needle, 0 to 1; None spreads the samples evenly.
        distractors: wrong values that the likelihood of the right one is compared with.
        answer_tokens: tokens that the model may write (RULER: 128).
        batch_size: prompts that are answered side by side; changes nothing but speed and memory.

    Returns:
        `accuracy`: share of answers, decoded greedily, that contain the value. `likelihood_accuracy`: share of
        samples whose right value is more likely than every distractor, `chance` for a model that remembers nothing.
        `margin`: nats by which the right value is more likely than the mean distractor, 0 by chance.
        Each with `_by_sample` behind its name: of every sample. `prompt_tokens`: on average. `depth`: mean depth of the
        samples in each fifth of the haystack that has any, and with one number each `accuracy_by_depth`,
        `likelihood_accuracy_by_depth` and `margin_by_depth`.

    Raises:
        ValueError: no tokenizer, a length beyond the model's learned positions, or an argument that `needle_prompts`
            refuses.
    """
    check_reader(subject, length)
    prompts = needle_prompts(
        subject.tokenizer,
        task,
        length,
        samples,
        seed,
        haystack,
        depth=depth,
        distractors=distractors,
        answer_tokens=answer_tokens,
        split_special_tokens=subject.split_special_tokens,
    )
    return means_of_scores(needle_scores(subject, prompts, answer_tokens, batch_size), distractors)


class NeedleScore(NamedTuple):
    """Of one sample: whether its value was written (0 or 1), whether it was likelier than every distractor, by how many
    nats it was likelier than the mean one, tokens of the prompt, and depth of the needle."""

    accuracy: float
    likelihood_accuracy: float
    margin: float
    prompt_tokens: int
    depth: float


def check_reader(subject: Subject, length: int) -> None:
    """Check that a model can read prompts of so many tokens.

    Raises:
        ValueError: it has no tokenizer, or fewer learned positions.
    """
    if subject.tokenizer is None:
        raise ValueError(f"subject: {subject.label!r} has no tokenizer, which text needs; give one")
    check_longest_text(subject.model, length)


def needle_scores(
    subject: Subject, prompts: Sequence[NeedlePrompt], answer_tokens: int, batch_size: int
) -> list[NeedleScore]:
    """The score of each prompt, with arguments and errors as of `needle_in_a_haystack`."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    scores: list[NeedleScore] = []
    with tqdm(total=2 * len(prompts), desc=f"{subject.label}, needles", unit=" readings") as progress:
        answers = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            answers += written_answers(subject, batch, answer_tokens)
            progress.update(len(batch))
        for prompt, answer in zip(prompts, answers, strict=True):
            right, *wrong = value_losses(subject, prompt)
            found, likelier = float(prompt.values[0] in answer.lower()), float(right < min(wrong))
            scores.append(NeedleScore(found, likelier, fmean(wrong) - right, len(prompt.ids), prompt.depth))
            progress.update()
    return scores


def means_of_scores(scores: Sequence[NeedleScore], distractors: int) -> dict[str, float | list[float]]:
    """What `needle_in_a_haystack` returns, of the scores of all samples."""
    names = ("accuracy", "likelihood_accuracy", "margin")
    by_name = {name: [getattr(score, name) for score in scores] for name in names}
    return {
        **{name: fmean(values) for name, values in by_name.items()},
        **{f"{name}_by_sample": values for name, values in by_name.items()},
        "chance": 1 / (1 + distractors),
        "prompt_tokens": fmean(score.prompt_tokens for score in scores),
        **_by_depth([score.depth for score in scores], by_name),
    }


def written_answers(subject: Subject, prompts: Sequence[NeedlePrompt], answer_tokens: int) -> list[str]:
    """What the model writes after each prompt, decoded greedily; the prompts are padded on the left to one batch."""
    tokenizer, device = subject.tokenizer, subject.model.device
    rows = [torch.tensor(prompt.ids) for prompt in prompts]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Masked columns may hold any id; with neither kind of token no row ends early, and generate needs none either.
    fill = 0 if padding is None else padding
    ids = pad_sequence(rows, batch_first=True, padding_value=fill, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").to(device)
    sequences = subject.model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        repetition_penalty=1.0,  # a penalty of the model's own settings would forbid copying
        max_new_tokens=answer_tokens,
        pad_token_id=padding,
        **subject.arguments,
    )
    return tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def value_losses(subject: Subject, prompt: NeedlePrompt) -> list[float]:
    """Negative log-likelihood in nats of each of the prompt's values, all of its tokens, right after the prompt.

    The prompt is read once; each value goes on from a copy of the cache. A model that returns no
    `cache` reads prompt and value together, once per value.
    """
    model, device = subject.model, subject.model.device
    ids = torch.tensor([prompt.ids], device=device)
    memory = model(ids[:, :-1], use_cache=True, logits_to_keep=1, **subject.arguments)
    memory = getattr(memory, "cache", None)
    losses = []
    for value in prompt.values:
        value_ids = continuation_ids(subject.tokenizer, prompt.question, f" {value}")
        tokens = torch.tensor([value_ids], device=device)
        if memory is None:
            nll = token_losses(subject, torch.cat([ids, tokens], dim=1))[:, -tokens.shape[1] :].sum()
        else:
            read = torch.cat([ids[:, -1:], tokens[:, :-1]], dim=1)
            forked = copy.deepcopy(memory)
            logits = model(read, cache=forked, use_cache=True, **subject.arguments).logits
            nll = cross_entropy(logits[0].float(), tokens[0], reduction="sum")
        losses.append(nll.item())
    return losses


def continuation_ids(tokenizer, before: str, after: str) -> list[int]:
    """Tokens of `after` where it follows `before`; only the end of a long text needs to be given as `before`."""
    start, whole = encode_texts([before, before + after], tokenizer)
    return whole[len(start) :]


def _by_depth(depths: Sequence[float], scores: dict[str, list[float]]) -> dict[str, list[float]]:
    """Means over the samples in each fifth of the haystack, empty ones left out."""
    buckets = [min(int(depth * DEPTH_BUCKETS), DEPTH_BUCKETS - 1) for depth in depths]

    def means(values: Sequence[float]) -> list[float]:
        return [
            fmean(value for value, at in zip(values, buckets, strict=True) if at == bucket)
            for bucket in sorted(set(buckets))
        ]

    return {"depth": means(depths), **{f"{name}_by_depth": means(values) for name, values in scores.items()}}
