"""The report of an experiment: one table with all that makes a comparison fair, and what is said to each claim."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..configuration.experiments import LOSS_TASKS, Experiment, Yardsticks
from .results import Point
from .tables import Table
from .verdicts import (
    DISAGREES,
    ClaimVerdict,
    Estimate,
    difference,
    find_estimate,
    is_trained,
    n_gram_label,
    pooled_seed_variance,
    shows_context,
)
from .yardsticks import COMPRESSORS

UNKNOWN_PROCESSOR = "a processor that the log does not name"  # by earlier versions


@dataclass(frozen=True)
class TrainedRow:
    """A row's models, one for each seed, and what their training took.

    Attributes:
        models: folders, or the preset where nothing is trained.
        tokens: that each of them was trained on.
        cpu_seconds: of all processes, mean over seeds; None where nothing is trained.
        processors: where those were measured.
    """

    models: list[str]
    tokens: int
    cpu_seconds: float | None
    processors: frozenset[str] = frozenset()


def report_text(
    experiment: Experiment, trained: Mapping[str, TrainedRow], points: Sequence[Point], verdicts: Sequence[ClaimVerdict]
) -> str:
    """What the paper found, what this run found, and whether they agree, as Markdown.

    Raises:
        KeyError: a row or a yardstick was not measured.
    """
    lines = [f"# {experiment.description}", "", f"Paper: {experiment.paper.strip()}", ""]
    for part in experiment.measured:
        if experiment.yardsticks is not None and part.task in LOSS_TASKS:
            own = [point for point in points if point.task == part.task]
            lines += [loss_comparison(experiment, trained, own, part.lengths).markdown()]
            found = [*notes(experiment.yardsticks, own, max(part.lengths)), processors_note(trained)]
            lines += [f"- {note}" for note in found] + [""]
    lines += ["| claim | this run | answer |", "| --- | --- | --- |"]
    for verdict in verdicts:
        answer = f"**{verdict.answer}**" if verdict.answer == DISAGREES else verdict.answer
        lines.append(f"| {verdict.claim} | {verdict.numbers} | {answer} |")
    return "\n".join(lines) + "\n"


def loss_comparison(
    experiment: Experiment, trained: Mapping[str, TrainedRow], points: Sequence[Point], lengths: Sequence[int]
) -> Table:
    """Losses by row, with what each row's training took and the yardsticks below.

    Behind a loss stands its standard error over seeds, where there are several.

    Args:
        points: of one task.
    """
    yardsticks, longest = experiment.yardsticks, max(lengths)
    assert yardsticks is not None
    n_grams = {
        label: find_estimate(points, label, longest, "loss").mean for label in map(n_gram_label, yardsticks.n_grams)
    }
    rows = []
    for label in (*experiment.rows, *n_grams, *COMPRESSORS):
        estimates = [find_estimate(points, label, length, "loss") for length in lengths]
        last = estimates[-1].mean
        below, row = [n_gram for n_gram, loss in n_grams.items() if last < loss], trained.get(label)
        marks = "" if row is None else f"better than {' and '.join(below)}" if below else "**not trained**"
        rows.append(
            [
                label,
                "" if row is None else f"{row.tokens:,}",
                "" if row is None else _shown_seconds(row.cpu_seconds),
                *(_with_error(estimate) for estimate in estimates),
                f"{in_bits_per_byte(last, points, longest):.3f}",
                marks,
            ]
        )
    header = ["", "training tokens", "CPU seconds", *(f"{length:,}" for length in lengths), "bits per byte", ""]
    return Table(f"{experiment.description} Nats per token", header, rows)


def in_bits_per_byte(loss: float, points: Sequence[Point], length: int) -> float:
    """A loss in nats per token of the texts that were measured, in bits per byte of the same."""
    numbers = next((p.numbers for p in points if p.label in COMPRESSORS and p.length == length), None)
    if numbers is None:
        raise KeyError(f"{' and '.join(COMPRESSORS)} have no 'loss' at length {length}")
    return loss * numbers["tokens"] / (math.log(2) * numbers["bytes"])


def notes(yardsticks: Yardsticks, points: Sequence[Point], length: int) -> list[str]:
    """What a reader must know before comparing anything."""
    found = []
    off = find_estimate(points, yardsticks.learning_off, length, "loss")
    twin = find_estimate(points, yardsticks.static_twin, length, "loss")
    apart = difference(off, twin, pooled_seed_variance([off, twin]))
    if apart.value > 0:
        found.append(
            f"**The outer training is not done:** {yardsticks.learning_off} is better than {yardsticks.static_twin} by "
            f"{_difference(apart.value, apart.error)}, which trained models would not be: the inner loop makes up for "
            "the outer one."
        )
    else:
        found.append(
            f"{yardsticks.static_twin} is better than {yardsticks.learning_off} by "
            f"{_difference(-apart.value, apart.error)}, as it should be."
        )
    full, limited = yardsticks.full_context, yardsticks.limited_context
    longer, shorter = (find_estimate(points, row, length, "loss") for row in (full, limited))
    gain = difference(longer, shorter, pooled_seed_variance([longer, shorter]))
    says = _difference(gain.value, gain.error)
    if shows_context(yardsticks, length, points):
        found.append(f"{full} is better than {limited} by {says}: the data rewards context beyond the window.")
    else:
        found.append(f"**No claim about context:** {full} gains {says} over {limited}, not two standard errors.")
    untrained = [row for row in (full, limited) if not is_trained(yardsticks, row, length, points)]
    if untrained:
        found.append(f"{' and '.join(untrained)}: not better than the {n_gram_label(yardsticks.n_grams[0])}.")
    return found


def processors_note(trained: Mapping[str, TrainedRow]) -> str:
    """Whether the CPU seconds of a table can be compared."""
    rows: dict[str, list[str]] = {}
    for label, row in trained.items():
        if row.processors:
            rows.setdefault(" and ".join(sorted(row.processors)), []).append(label)
    if len(rows) < 2 and not any(UNKNOWN_PROCESSOR in where for where in rows):
        return f"CPU seconds: {', '.join(rows) or 'nothing was trained'}."
    places = "; ".join(f"{where}: {', '.join(labels)}" for where, labels in rows.items())
    return f"**CPU seconds may come from several machines**, and can be compared only within one. {places}."


def _shown_seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:,.3g}" if seconds < 10 else f"{seconds:,.0f}"


def _difference(value: float, error: float | None) -> str:
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _with_error(estimate: Estimate) -> str:
    variance = estimate.seed_variance()
    shown = f"{estimate.mean:.3f}"
    return shown if variance is None else f"{shown} ± {(variance / len(estimate.seeds)) ** 0.5:.3f}"
