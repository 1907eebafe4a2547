"""Whether a run agrees with the paper: a third answer, and what forbids any.

Two numbers are told apart where they differ by more than two standard errors of their difference, over documents (each
read by both systems) and over seeds; otherwise the claim is not resolved. No claim is judged with a system that is not
better than a 3-gram model, and none about context where full attention gains nothing over its window-limited twin.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..configuration.experiments import Claim, Experiment, Number, Yardsticks
from .loss_by_position import BLOCK
from .results import Point

AGREES, DISAGREES, NOT_RESOLVED, NOT_JUDGED = "agrees", "disagrees", "not resolved", "not judged"
STANDARD_ERRORS = 2
# Of what has no standard error (times, sizes): so much of the larger number is told apart.
TOLD_APART = 0.05


@dataclass(frozen=True)
class Estimate:
    """A measured number of a row.

    Attributes:
        seeds: the number, of each of its trainings.
        documents: the number of each document (or sample), mean over seeds; empty where there are none.
    """

    seeds: Sequence[float]
    documents: Sequence[float] = ()

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seeds)

    def seed_variance(self) -> float | None:
        """Of one training; None where there is only one."""
        return statistics.variance(self.seeds) if len(self.seeds) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A larger number minus a smaller one, with its standard error (None: there is none to be had)."""

    value: float
    error: float | None

    def answer(self, scale: float) -> str:
        """Agrees, disagrees or not resolved; `scale` is the size of the numbers."""
        least = TOLD_APART * scale if self.error is None else STANDARD_ERRORS * self.error
        return NOT_RESOLVED if abs(self.value) <= least else AGREES if self.value > 0 else DISAGREES


@dataclass(frozen=True)
class ClaimVerdict:
    """What a run says to a claim of the paper.

    Attributes:
        claim: in words.
        answer: one of the four of this module.
        numbers: what was measured, in words, or why nothing is judged.
    """

    claim: str
    answer: str
    numbers: str


def judge_claims(experiment: Experiment, points: Sequence[Point]) -> list[ClaimVerdict]:
    """What a run says to each claim of its experiment."""
    numbers = [(number_of(points, claim.smaller), number_of(points, claim.larger)) for claim in experiment.claims]
    seed_variance = pooled_seed_variance([each for pair in numbers for each in pair])
    verdicts = []
    for claim, (smaller, larger) in zip(experiment.claims, numbers, strict=True):
        found = difference(smaller, larger, seed_variance)
        shown = f"{claim.smaller.row} {_shown(smaller.mean)}, {claim.larger.row} {_shown(larger.mean)}"
        if found.error is not None:
            shown += f"; difference {found.value:+.3f} ± {found.error:.3f}"
        why_not = None if experiment.yardsticks is None else forbids(experiment.yardsticks, claim, points)
        if why_not is not None:
            verdicts.append(ClaimVerdict(claim.text, NOT_JUDGED, f"{shown}: {why_not}"))
        else:
            scale = max(abs(smaller.mean), abs(larger.mean))
            verdicts.append(ClaimVerdict(claim.text, found.answer(scale), shown))
    return verdicts


def forbids(yardsticks: Yardsticks, claim: Claim, points: Sequence[Point]) -> str | None:
    """Why a claim must not be judged, or None."""
    for number in (claim.smaller, claim.larger):
        if not is_trained(yardsticks, number.row, number.length, points):
            return f"{number.row} is not better than the {n_gram_label(yardsticks.n_grams[0])} of the same text"
    longest = max(claim.smaller.length, claim.larger.length)
    if claim.about_context and shows_context(yardsticks, longest, points) is False:
        return (
            f"{yardsticks.full_context} gains nothing over {yardsticks.limited_context}, so that this data shows "
            "nothing about context"
        )
    return None


def is_trained(yardsticks: Yardsticks, row: str, length: int, points: Sequence[Point]) -> bool:
    """Whether a row's loss is below that of the smallest n-gram model; true where no loss was measured."""
    try:
        own = find_estimate(points, row, length, "loss")
        counted = find_estimate(points, n_gram_label(yardsticks.n_grams[0]), length, "loss")
    except KeyError:
        return True
    return own.mean < counted.mean


def shows_context(yardsticks: Yardsticks, length: int, points: Sequence[Point]) -> bool | None:
    """Whether full attention is better than its window-limited twin by two standard errors; None: not measured."""
    try:
        full = find_estimate(points, yardsticks.full_context, length, "loss")
        limited = find_estimate(points, yardsticks.limited_context, length, "loss")
    except KeyError:
        return None
    found = difference(full, limited, pooled_seed_variance([full, limited]))
    return found.answer(scale=limited.mean) == AGREES


def n_gram_label(order: int) -> str:
    """The row of a table for the n-gram model of an order."""
    return f"{order}-gram"


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def seed_label(label: str, seed: int) -> str:
    """The label of a row's training with a seed."""
    return label if seed == 0 else f"{label}, seed {seed}"


def find_estimate(points: Sequence[Point], row: str, length: int, name: str, first: int = 0, end: int = 0) -> Estimate:
    """The number of a row, over its seeds.

    Args:
        first, end: of a list of numbers, the mean of those from `first` up to `end` (0: to the last).

    Raises:
        KeyError: it was not measured.
    """
    found: list[Point] = []
    while True:
        label = seed_label(row, len(found))
        point = next((p for p in points if (p.label, p.length) == (label, length) and name in p.numbers), None)
        if point is None:
            break
        found.append(point)
    if not found:
        raise KeyError(f"{row!r} has no {name!r} at length {length}")
    values = [_number(point, name, first, end) for point in found]
    documents = [_by_document(point, name, first, end) for point in found]
    means = [statistics.fmean(each) for each in zip(*documents, strict=True)] if all(documents) else []
    return Estimate(values, means)


def difference(smaller: Estimate, larger: Estimate, seed_variance: float | None) -> Difference:
    """Larger minus smaller.

    Args:
        seed_variance: for a row with one training, the variance that others of the same kind have; None: not known.
    """
    value = larger.mean - smaller.mean
    if not smaller.documents or len(smaller.documents) != len(larger.documents) or len(smaller.documents) < 2:
        return Difference(value, None)
    pairs = [b - a for a, b in zip(smaller.documents, larger.documents, strict=True)]
    variance = statistics.variance(pairs) / len(pairs)
    for each in (smaller, larger):
        own = each.seed_variance()
        own = seed_variance if own is None else own
        variance += (own or 0.0) / len(each.seeds)
    return Difference(value, variance**0.5)


def pooled_seed_variance(estimates: Sequence[Estimate]) -> float | None:
    """The mean variance over seeds of the rows that have several; None where none has."""
    known = [variance for each in estimates if (variance := each.seed_variance()) is not None]
    return statistics.fmean(known) if known else None


def number_of(points: Sequence[Point], number: Number) -> Estimate:
    """The number that a claim speaks of."""
    return find_estimate(points, number.row, number.length, number.name, number.first, number.end)


def _number(point: Point, name: str, first: int, end: int) -> float:
    found = point.numbers[name]
    return statistics.fmean(found[first : end or len(found)]) if isinstance(found, list) else found


def _by_document(point: Point, name: str, first: int, end: int) -> list[float]:
    numbers = point.numbers
    if name in ("loss", "loss_by_position") and "loss_by_block" in numbers:
        last = -(-end // BLOCK) if end else None
        return [statistics.fmean(blocks[first // BLOCK : last]) for blocks in numbers["loss_by_block"]]
    return list(numbers.get(f"{name}_by_document") or numbers.get(f"{name}_by_sample") or ())
