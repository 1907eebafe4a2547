"""What can be measured: the tasks of `ttt-e2e evaluate`, their settings and the numbers that they give."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict

from ..configuration.strict_yaml import build_strictly, parse_yaml
from ..data.needles import needle_prompts
from .bits_per_byte import TextBits, means_of_texts, text_bits
from .comparison import Quantity
from .decoding_loss import decoding_loss
from .latency import latency
from .loss_by_context_length import means_of_documents
from .loss_by_position import loss_by_position, means_of_positions
from .needle_in_a_haystack import NeedleScore, check_reader, means_of_scores, needle_scores
from .perplexity import perplexity_of_losses
from .subject import Subject, first_tokens


@dataclass(frozen=True)
class TaskData:
    """What a task reads; each task uses its own part.

    Attributes:
        documents: token ids, int64 [documents, longest length]; None where the task reads none.
        texts: documents of at least the longest length, in bytes; None where the task reads none.
        haystack: texts to hide needles in, or None.
        judge: scores what the others write, or None.
        batch_size: documents read side by side.
        samples: numbers of those samples that are measured, of a task that makes its own; None for all.
    """

    documents: torch.Tensor | None = None
    texts: Sequence[str] | None = None
    haystack: Sequence[str] | None = None
    judge: Subject | None = None
    batch_size: int = 1
    samples: Sequence[int] | None = None

    def count(self, settings: Any) -> int:
        """How many documents, or samples, are measured."""
        if self.documents is not None:
            return len(self.documents)
        return settings.samples if self.texts is None else len(self.texts)

    def only(self, numbers: Sequence[int]) -> "TaskData":
        """The data with no other documents, or samples, than these."""
        documents = None if self.documents is None else self.documents[list(numbers)]
        texts = None if self.texts is None else [self.texts[number] for number in numbers]
        return dataclasses.replace(self, documents=documents, texts=texts, samples=tuple(numbers))


@strict
@dataclass
class NoSettings:
    """A task without settings."""


@strict
@dataclass
class DecodingSettings:
    """Attributes: tokens written after each document's beginning, and how they are sampled; temperature 0 is greedy."""

    new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.1
    seed: int = 0

    def sampling(self) -> dict:
        """Arguments of `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "repetition_penalty": self.repetition_penalty}
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        return {"do_sample": True} | {name: getattr(self, name) for name in names}


@strict
@dataclass
class LatencySettings:
    """Attributes: tokens written, sequences side by side, and measurements of which the median counts.

    For a model that learns, `new_tokens` should be a multiple of its mini-batch, so that writing bears its share of the
    inner steps.
    """

    new_tokens: int = 32
    rows: int = 1
    repeats: int = 3


@strict
@dataclass
class NeedleSettings:
    """Attributes: as `needle_in_a_haystack` takes them; `task` 1, 2 or 3 is RULER's S-NIAH-1, -2 or -3."""

    task: int = 1
    samples: int = 100
    seed: int = 0
    depth: float | None = None
    distractors: int = 9
    answer_tokens: int = 128


@dataclass(frozen=True)
class Task:
    """One kind of measurement.

    Attributes:
        name: on the command line, where it is also described.
        settings: a strict dataclass with a default for every field.
        quantities: what tables and pictures show.
        parts: what is measured of a subject by data, length and settings: an entry for each document or sample.
        numbers: the point, of all parts and the settings; plain JSON values.
        by_one_process: the parts belong together, so that several processes do not share them out: random numbers that
            follow one another, or times that other work would change.
        needs_data: it reads documents, as tokens or (`own_tokens`) as text that each model cuts into tokens of its own,
            with lengths in bytes; takes_haystack: it may read one; needs_judge: it has what is written scored.
        needs_tokenizer: it reads text.
        depends_on_device: its numbers are only comparable on the same device.
        least: the smallest length.
        of_losses: the point, of the losses [documents, length - 1] of each token, where nothing else is measured.
    """

    name: str
    settings: type
    quantities: tuple[Quantity, ...]
    parts: Callable[[Subject, TaskData, int, Any], Sequence | torch.Tensor]
    numbers: Callable[[Any, Any], dict]
    by_one_process: bool = False
    needs_data: bool = True
    own_tokens: bool = False
    takes_haystack: bool = False
    needs_judge: bool = False
    needs_tokenizer: bool = True
    depends_on_device: bool = False
    least: int = 2
    of_losses: Callable[[torch.Tensor], dict] | None = None

    def measure(self, subject: Subject, data: TaskData, length: int, settings: Any) -> dict:
        """One point, by this process alone."""
        return self.numbers(self.parts(subject, data, length, settings), settings)


def _losses(subject: Subject, data: TaskData, length: int, settings: NoSettings) -> torch.Tensor:
    documents = first_tokens(data.documents, length)
    return loss_by_position(subject, documents, data.batch_size, description=subject.label)


def _bits(subject: Subject, data: TaskData, length: int, settings: NoSettings) -> list[TextBits]:
    return text_bits(subject, data.texts, length)


def _decoding(subject: Subject, data: TaskData, length: int, settings: DecodingSettings) -> list[dict]:
    numbers = decoding_loss(
        subject,
        data.judge,
        data.documents,
        length,
        settings.new_tokens,
        settings.sampling(),
        settings.seed,
        batch_size=data.batch_size,
        buckets=settings.new_tokens,  # one for each token: tables and pictures average on their own
    )
    kept = {name: numbers[name] for name in ("loss", "loss_by_document", "tokens")}
    return [kept | {"loss_by_position": numbers["loss_by_bucket"]}]


def _latency(subject: Subject, data: TaskData, length: int, settings: LatencySettings) -> list[dict]:
    return [latency(subject, length, settings.new_tokens, rows=settings.rows, repeats=settings.repeats)]


def _needle(subject: Subject, data: TaskData, length: int, settings: NeedleSettings) -> list[NeedleScore]:
    check_reader(subject, length)
    prompts = needle_prompts(
        subject.tokenizer,
        length=length,
        haystack=data.haystack,
        split_special_tokens=subject.split_special_tokens,
        **dataclasses.asdict(settings),
    )
    mine = prompts if data.samples is None else [prompts[number] for number in data.samples]
    return needle_scores(subject, mine, settings.answer_tokens, data.batch_size)


def _of_parts(numbers: Callable[[Any], dict]) -> Callable[[Any, Any], dict]:
    """For parts that need no settings to be put together."""
    return lambda parts, settings: numbers(parts)


def _single(parts: Sequence[dict]) -> dict:
    [numbers] = parts
    return numbers


MAY_BE_ZERO = ("seed", "temperature", "top_k", "depth")
LOSS = Quantity("loss", "Loss", "nats per token")

TASKS = {
    task.name: task
    for task in (
        Task(
            "loss-by-position",
            NoSettings,
            (Quantity("loss_by_position", "Loss", "nats per token", by_position=True),),
            _losses,
            _of_parts(means_of_positions),
            of_losses=means_of_positions,
        ),
        Task(
            "perplexity",
            NoSettings,
            (Quantity("perplexity", "Perplexity", "per token"), LOSS),
            _losses,
            _of_parts(perplexity_of_losses),
        ),
        Task(
            "context-length",
            NoSettings,
            (Quantity("loss", "Loss", "nats per token", by_document="loss_by_document"),),
            _losses,
            _of_parts(means_of_documents),
            of_losses=means_of_documents,
        ),
        Task(
            "bits-per-byte",
            NoSettings,
            (Quantity("bits_per_byte", "Loss", "bits per byte", by_document="bits_per_byte_by_document"),),
            _bits,
            _of_parts(means_of_texts),
            own_tokens=True,
            least=1,
        ),
        Task(
            "decoding",
            DecodingSettings,
            (LOSS, Quantity("loss_by_position", "Loss of written tokens", "nats per token", by_position=True, first=0)),
            _decoding,
            _of_parts(_single),
            by_one_process=True,
            needs_judge=True,
            least=1,
        ),
        Task(
            "latency",
            LatencySettings,
            (
                Quantity("prefill_seconds_per_1k_tokens", "Reading", "seconds per 1K tokens", decimals=4),
                Quantity("decode_milliseconds_per_token", "Writing", "milliseconds per token", decimals=2),
                Quantity("peak_memory_bytes", "Memory at the peak, beyond the model", "MiB", scale=2**-20),
                Quantity("cache_bytes", "Memory kept of the context", "MiB", scale=2**-20),
            ),
            _latency,
            _of_parts(_single),
            by_one_process=True,
            needs_data=False,
            needs_tokenizer=False,
            depends_on_device=True,
            least=1,
        ),
        Task(
            "needle",
            NeedleSettings,
            (
                Quantity("accuracy", "Needles written", "share of samples"),
                Quantity("likelihood_accuracy", "Needles likelier than wrong values", "share of samples"),
                Quantity("margin", "Margin of the needle over wrong values", "nats"),
            ),
            _needle,
            lambda scores, settings: means_of_scores(scores, settings.distractors),
            needs_data=False,
            takes_haystack=True,
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in TASKS:
        similar = difflib.get_close_matches(name, TASKS, n=1)
        nearest = f"did you mean {similar[0]!r}? The tasks are" if similar else "choose one of"
        raise ValueError(f"task={name!r}: there is no such task; {nearest} {', '.join(TASKS)}")
    return TASKS[name]


def task_settings(task: Task, overrides: Sequence[str]):
    """The settings of a task, with some of them replaced.

    Args:
        overrides: such as "new_tokens=64".

    Raises:
        ValueError: one is not FIELD=VALUE, the task has no such field, or the value is of the wrong type or range.
    """
    values = {}
    for override in overrides:
        field, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override}: must be FIELD=VALUE")
        values[field.strip()] = parse_yaml(value, source=f"--set {override}")
    if values and not dataclasses.fields(task.settings):
        raise ValueError(f"--set {overrides[0]}: the task {task.name!r} has no settings; leave it out")
    for field in dataclasses.fields(task.settings):
        if type(values.get(field.name)) is int and field.type in (float, float | None):
            values[field.name] = float(values[field.name])
    settings = build_strictly(task.settings, values, source="--set")
    for name, value in dataclasses.asdict(settings).items():
        least = 0 if name in MAY_BE_ZERO else 1 if isinstance(value, int) else None
        if least is not None and value is not None and value < least:
            raise ValueError(f"--set {name}={value}: must be at least {least}")
    return settings
