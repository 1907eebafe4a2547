"""Several models beside each other: tables and curves of measured points, and their differences to a baseline."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .loss_by_position import bucket_bounds
from .plots import Panel, smoothed_curve
from .results import Point
from .tables import Table

CURVE_POINTS = 64  # of a curve over positions; more cannot be told apart in a picture
BUCKETS = 6  # of a table over positions
MISSING, NOT_FINITE = "", "not finite"

# By label, what was measured at each length: a number, one per position or document, or None (not finite).
Series = dict[str, dict[int, Any]]


@dataclass(frozen=True)
class Quantity:
    """A number that a task measures.

    Attributes:
        key: its name in `Point.numbers`.
        title: in tables and pictures; unit: of it.
        decimals: shown in tables.
        scale: what one value of `Point.numbers` is multiplied with to be in `unit`.
        by_position: a list with one value per position, not one value; its first value is of position `first`.
        by_document: the name in `Point.numbers` of the same quantity for each document, or None. It gives differences
            a standard error: documents differ far more from one another than models do.
    """

    key: str
    title: str
    unit: str
    decimals: int = 3
    by_position: bool = False
    first: int = 1
    by_document: str | None = None
    scale: float = 1


def measured(points: Sequence[Point], quantity: Quantity) -> Series:
    """What was measured of a quantity, by label and length; points without it are left out."""
    series: Series = {}
    for point in points:
        if quantity.key in point.numbers:
            value = point.numbers[quantity.key]
            scaled = value if quantity.scale == 1 or value is None else value * quantity.scale
            series.setdefault(point.label, {})[point.length] = scaled
    return series


def difference_to(series: Series, baseline: str) -> Series:
    """Each model's values minus the baseline's at the same lengths (and positions); negative is below the baseline.

    Lengths at which the baseline was not measured are left out. Of a value that is not finite the difference is None.
    """
    reference = series.get(baseline, {})
    return {
        label: {length: _minus(value, reference[length]) for length, value in values.items() if length in reference}
        for label, values in series.items()
    }


def comparison_tables(points: Sequence[Point], quantities: Sequence[Quantity], baseline: str | None) -> list[Table]:
    """One table per quantity, a row per model and a column per length (or per range of positions).

    Args:
        points: of one task.
        quantities: of that task.
        baseline: a label; each table is then followed by one of the differences to it.
    """
    tables = []
    for quantity in quantities:
        title, series = f"{quantity.title} ({quantity.unit})", measured(points, quantity)
        build = _tables_by_position if quantity.by_position else _table_by_length
        tables += build(series, quantity, title)
        if baseline is None:
            continue
        differences = difference_to(series, baseline)
        differences.pop(baseline, None)  # all zero
        title = f"{title}, minus {baseline}"
        if quantity.by_position or quantity.by_document is None:
            tables += build(differences, quantity, title, sign="+")
        else:
            errors = standard_errors(points, quantity, baseline)
            title += " ± standard error over documents" if errors else ""
            tables += _table_by_length(differences, quantity, title, sign="+", errors=errors)
    return tables


def standard_errors(points: Sequence[Point], quantity: Quantity, baseline: str) -> Series:
    """Standard error of each mean difference to the baseline, taken document by document.

    Lengths with fewer than two documents, and the baseline itself, are left out.
    """
    by_document = measured(points, dataclasses.replace(quantity, key=quantity.by_document))
    errors: Series = {}
    for label, values in difference_to(by_document, baseline).items():
        for length, differences in values.items():
            if label != baseline and len(differences) > 1:
                spread = torch.tensor(_numbers(differences), dtype=torch.float64).std().item()
                errors.setdefault(label, {})[length] = spread / len(differences) ** 0.5
    return errors


def over_trainings(series: Series, trainings: Mapping[str, str]) -> tuple[Series, Series]:
    """One entry for all trainings of a row: their mean, and its standard error.

    Args:
        trainings: by label, the row of which it is a training; other labels stand for themselves.

    Returns:
        The means, and the errors of rows with several trainings at a length.
    """
    grouped: dict[str, dict[int, list]] = {}
    for label, values in series.items():
        for length, value in values.items():
            grouped.setdefault(trainings.get(label, label), {}).setdefault(length, []).append(value)
    means: Series = {row: {} for row in grouped}
    errors: Series = {}
    for row, by_length in grouped.items():
        for length, found in by_length.items():
            means[row][length] = found[0]
            if len(found) > 1:
                numbers = [_numbers(each) for each in found] if isinstance(found[0], list) else _numbers(found)
                stacked = torch.tensor(numbers, dtype=torch.float64)
                means[row][length] = stacked.mean(dim=0).tolist()
                errors.setdefault(row, {})[length] = (stacked.std(dim=0) / len(found) ** 0.5).tolist()
    return means, errors


def comparison_panels(
    points: Sequence[Point],
    quantities: Sequence[Quantity],
    baseline: str | None,
    trainings: Mapping[str, str] | None = None,
) -> list[list[Panel]]:
    """What `plot_panels` draws: a row per quantity (and length, of a quantity by position), differences beside it.

    Without differences two of them share a row.

    Args:
        trainings: as `over_trainings` takes them; a quantity by length then has a band of one standard error.
    """
    rows = []
    for quantity in quantities:
        series, errors = over_trainings(measured(points, quantity), trainings or {})
        variants = [(series, quantity.title)]
        if baseline is not None:
            variants.append((difference_to(series, baseline), f"{quantity.title}, minus {baseline}"))
        if quantity.by_position:
            for length in _lengths(series):
                rows.append([_position_panel(part, quantity, title, length) for part, title in variants])
        elif series:
            panels = [_length_panel(part, quantity, title) for part, title in variants]
            bands = {row: [of_row.get(n, 0.0) for n in sorted(series[row])] for row, of_row in errors.items()}
            rows.append([dataclasses.replace(panels[0], bands=bands), *panels[1:]])
    if baseline is None:
        panels = [panel for row in rows for panel in row]
        rows = [panels[first : first + 2] for first in range(0, len(panels), 2)]
    return rows


def position_means(values: Sequence[float], first: int, bounds: Sequence[tuple[int, int]]) -> list[float]:
    """Mean of the values at positions [start, end) of each range; nan where there is none.

    Args:
        values: one per position, from position `first` on.
    """
    tensor = torch.tensor(values, dtype=torch.float64)
    return [tensor[max(start - first, 0) : max(end - first, 0)].mean().item() for start, end in bounds]


def _minus(value: Any, reference: Any) -> Any:
    if value is None or reference is None:
        return None
    if isinstance(value, list):
        return [_minus(one, other) for one, other in zip(value, reference, strict=True)]
    return value - reference


def _lengths(series: Series) -> list[int]:
    return sorted({length for values in series.values() for length in values})


def _table_by_length(
    series: Series, quantity: Quantity, title: str, sign: str = "", errors: Series | None = None
) -> list[Table]:
    lengths, rows = _lengths(series), []
    for label, values in series.items():
        row = [label]
        for length in lengths:
            shown = _shown(values[length], quantity.decimals, sign) if length in values else MISSING
            error = (errors or {}).get(label, {}).get(length)
            row.append(shown if error is None else f"{shown} ± {_shown(error, quantity.decimals)}")
        rows.append(row)
    return [Table(f"{title}, by context length", ["", *(f"{length:,}" for length in lengths)], rows)] if lengths else []


def _tables_by_position(series: Series, quantity: Quantity, title: str, sign: str = "") -> list[Table]:
    tables = []
    for length in _lengths(series):
        curves = {label: values[length] for label, values in series.items() if length in values}
        end = max(quantity.first + len(curve) for curve in curves.values())
        bounds = _doubling_ranges(quantity.first, end)
        rows = []
        for label, curve in curves.items():
            means = position_means(_numbers(curve), quantity.first, bounds)
            overall = position_means(_numbers(curve), quantity.first, [(quantity.first, end)])
            rows.append([label, *(_shown(mean, quantity.decimals, sign) for mean in means + overall)])
        header = ["", *(f"{start}-{end - 1}" if end - start > 1 else f"{start}" for start, end in bounds), "all"]
        tables.append(Table(f"{title}, by position, length {length:,}", header, rows))
    return tables


def _doubling_ranges(first: int, end: int) -> list[tuple[int, int]]:
    """Ranges [start, end) that halve towards the beginning, where the loss changes fastest."""
    edges = {end >> shift for shift in range(1, BUCKETS)}
    return bucket_bounds([first, *sorted(edge for edge in edges if edge > first)], end)


def _shown(value: float | None, decimals: int, sign: str = "") -> str:
    return NOT_FINITE if value is None or value != value else f"{value:{sign},.{decimals}f}"


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _length_panel(series: Series, quantity: Quantity, title: str) -> Panel:
    curves = {
        label: (sorted(values), _numbers([values[n] for n in sorted(values)])) for label, values in series.items()
    }
    return Panel(title, "context length (tokens)", quantity.unit, curves, ticks=_lengths(series))


def _position_panel(series: Series, quantity: Quantity, title: str, length: int) -> Panel:
    curves = {}
    for label, values in series.items():
        if length in values:
            numbers = torch.tensor(_numbers(values[length]))
            positions, means = smoothed_curve(numbers[None], -(-len(numbers) // CURVE_POINTS))
            # The curve counts from position 1.
            curves[label] = ([position + quantity.first - 1 for position in positions], means)
    return Panel(f"{title}, length {length:,}", "position (tokens)", quantity.unit, curves)
