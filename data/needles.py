"""Prompts of the single-needle tasks of RULER: one sentence worth remembering in a long text that is not.

Source: RULER (arXiv 2404.06654), tasks S-NIAH 1, 2 and 3, which Table 2 of arXiv 2512.23675 reports.
"""

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from .tokenizer import encode_texts

SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")


@dataclass(frozen=True)
class NeedlePrompt:
    """One question about one needle.

    Attributes:
        text: haystack with the needle, question, and the beginning of the answer.
        ids: its tokens, with the special tokens that the tokenizer puts before a text.
        question: the end of `text` behind the haystack.
        values: what may follow the text, after a space: the value of the needle, then values that occur nowhere.
        depth: wanted place of the needle in the haystack, 0 the beginning, 1 the end.
    """

    text: str
    ids: list[int]
    question: str
    values: list[str]
    depth: float


@dataclass(frozen=True)
class Haystack:
    """Text to hide a needle in.

    Attributes:
        units: words, or sentences; repeated from the beginning where more are needed.
        separator: between two units.
        ends: per unit, whether a needle may stand behind it.
    """

    units: Sequence[str]
    separator: str
    ends: Sequence[bool]

    def with_needle(self, needle: str, first: int, count: int, depth: float) -> str:
        """`count` units from unit `first` on, and the needle at the sentence end that is nearest to `depth`."""
        indices = [(first + offset) % len(self.units) for offset in range(count)]
        places = [0, *(offset + 1 for offset, index in enumerate(indices) if self.ends[index]), count]
        place = min(places, key=lambda candidate: abs(candidate - depth * count))
        texts = [self.units[index] for index in indices]
        return self.separator.join([*texts[:place], needle, *texts[place:]])


@cache
def needle_settings() -> dict:
    """What `needles.yaml` holds: wording, tasks, and the words that keys are made of."""
    settings = yaml.safe_load(Path(__file__).with_name("needles.yaml").read_text(encoding="utf-8"))
    return settings | {name: settings[name].split() for name in ("adjectives", "nouns")}


@dataclass(frozen=True)
class SampledNeedle:
    """A fact to hide, and the words around it.

    Attributes:
        before, after: the prompt's text before and behind the haystack; `after` ends where the value is asked for.
        sentence: the needle.
        values: its value, then others that occur nowhere.
    """

    before: str
    sentence: str
    after: str
    values: list[str]


def sampled_needle(kind: str, generator: random.Random, distractors: int = 0) -> SampledNeedle:
    """A key and a value of a kind ("number" of seven digits, or "uuid"), in the words of RULER."""
    settings = needle_settings()
    key = f"{generator.choice(settings['adjectives'])}-{generator.choice(settings['nouns'])}"
    values = _different_values(kind, 1 + distractors, generator)
    sentence = settings["needle"].format(kind=kind, key=key, value=values[0])
    before, after = (
        part.format(kind=kind, key=key) for part in (settings["prompt"] + settings["answer"]).split("{context}")
    )
    return SampledNeedle(before, sentence, after, values)


def needle_prompts(
    tokenizer: PreTrainedTokenizerBase,
    task: int,
    length: int,
    samples: int,
    seed: int,
    haystack: Sequence[str] | None = None,
    *,
    depth: float | None = None,
    distractors: int = 9,
    answer_tokens: int = 128,
    split_special_tokens: bool = True,
) -> list[NeedlePrompt]:
    """Prompts that fill `length` tokens as far as whole words (task 1: whole sentences) do.

    Sample i has the same key, values and place in the haystack at every length.

    Args:
        tokenizer: counts the tokens.
        task: 1 repeated noise sentences and a 7-digit number, 2 a text and a number, 3 a text and a UUID.
        length: tokens at most, prompt and answer together.
        samples: how many prompts.
        seed: of keys, values and places in the haystack.
        haystack: documents for tasks 2 and 3, joined into one text; None takes `documentation_texts()`.
        depth: of the needle, 0 to 1; None spreads the samples evenly over the haystack.
        distractors: wrong values beside the right one.
        answer_tokens: room for the answer.
        split_special_tokens: as in `encode_texts`, for the haystack.

    Raises:
        ValueError: an argument out of its range, or a length that has no room for question and answer.
    """
    settings = needle_settings()
    _check(task, length, samples, haystack, depth, distractors, answer_tokens)
    kind, hay = settings["tasks"][task]["kind"], _task_haystack(task, haystack)

    def encode(text: str) -> list[int]:
        [ids] = encode_texts([text], tokenizer, split_special_tokens, add_special_tokens=True)
        return ids

    depths = [depth if depth is not None else (index + 0.5) / samples for index in range(samples)]
    prompts = []
    for index, place in enumerate(depths):
        # A generator per sample: how much one draws, or another length, changes no other sample.
        generator = random.Random(f"needle {seed} {task} {index}")
        needle = sampled_needle(kind, generator, distractors)
        first = generator.randrange(len(hay.units))
        text = partial(_text, hay, needle.before, needle.sentence, needle.after, first, place)
        fitting = text(_largest_count(partial(_count_tokens, encode, text), length, answer_tokens))
        prompts.append(NeedlePrompt(fitting, encode(fitting), needle.after, needle.values, place))
    return prompts


def documentation_texts() -> list[str]:
    """Prose without a download: the paragraphs of Python's own reference manual, as `help()` shows it.

    About 30 thousand words; they differ a little between versions of Python.
    """
    from pydoc_data.topics import topics

    paragraphs = {name: text.split("\n\n") for name, text in sorted(topics.items())}
    # Grammar, code and tables are indented; titles and short notes do not end like a sentence.
    prose = {
        name: [part for part in parts if not re.search(r"^\s|\n\s{3}", part) and SENTENCE_END.search(part)]
        for name, parts in paragraphs.items()
    }
    return [" ".join(parts) for parts in prose.values() if parts]


def ruler_essays() -> list[str]:
    """The essays of RULER's own haystack, from the Hub (needs the network, or the Hub's cache on disk)."""
    from datasets import load_dataset

    return list(load_dataset("baber/paul_graham_essays", split="train")["text"])


def _check(task, length, samples, haystack, depth, distractors, answer_tokens) -> None:
    tasks = list(needle_settings()["tasks"])
    if task not in tasks:
        raise ValueError(f"task={task!r}: must be one of {tasks}")
    counts = {"length": length, "samples": samples, "distractors": distractors, "answer_tokens": answer_tokens}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: must be between 0 (the beginning) and 1 (the end), or None for all depths")
    if isinstance(haystack, str):
        raise ValueError("haystack: one string; give a list of documents")
    if haystack is not None and not any(text.strip() for text in haystack):
        raise ValueError(f"haystack: {len(haystack)} documents without a word; give some text, or None")


def _task_haystack(task: int, documents: Sequence[str] | None) -> Haystack:
    settings = needle_settings()
    if settings["tasks"][task]["haystack"] == "noise":
        return Haystack([settings["noise"]], "\n", [True])
    words = " ".join(documentation_texts() if documents is None else documents).split()
    return Haystack(words, " ", [SENTENCE_END.search(word) is not None for word in words])


def _text(hay: Haystack, before: str, needle: str, after: str, first: int, depth: float, count: int) -> str:
    return before + hay.with_needle(needle, first, count, depth) + after


def _count_tokens(encode: Callable[[str], list[int]], text: Callable[[int], str], count: int) -> int:
    return len(encode(text(count)))


def _different_values(kind: str, count: int, generator: random.Random) -> list[str]:
    values: dict[str, None] = {}  # a set that keeps the order
    while len(values) < count:
        number = generator.randint(10**6, 10**7 - 1)
        values[str(number) if kind == "number" else str(uuid.UUID(int=generator.getrandbits(128), version=4))] = None
    return list(values)


def _largest_count(tokens: Callable[[int], int], length: int, answer_tokens: int) -> int:
    """The largest count of units whose prompt leaves room for the answer; tokens grow about evenly with the count."""
    limit = length - answer_tokens
    low, high = 1, 2
    tokens_low, tokens_high = tokens(low), tokens(high)
    if tokens_low > limit:
        raise ValueError(
            f"length={length}: too short for the question; with answer_tokens={answer_tokens} it must be at least "
            f"{tokens_low + answer_tokens}"
        )
    while tokens_high <= limit:
        low, tokens_low = high, tokens_high
        high *= 2
        tokens_high = tokens(high)
    while high - low > 1:
        guess = low + (limit - tokens_low) * (high - low) // (tokens_high - tokens_low)
        middle = min(max(guess, low + 1), high - 1)
        tokens_middle = tokens(middle)
        if tokens_middle <= limit:
            low, tokens_low = middle, tokens_middle
        else:
            high, tokens_high = middle, tokens_middle
    return low
