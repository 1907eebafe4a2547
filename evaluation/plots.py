"""Pictures of evaluation results."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: works without a display
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator

from ..storage.disk import written_whole

# Colour-blind safe (Okabe and Ito), the system under study first.
COLOURS = ["#0072B2", "#56B4E9", "#E69F00", "#555555", "#CC79A7", "#009E73", "#D55E00"]
LINES = ["-", "--", ":", "-."]  # one after the other, when the colours are used up


@dataclass(frozen=True)
class Panel:
    """One plot of a picture.

    Attributes:
        title: above it; x_label, y_label: of its axes.
        curves: by name, as long as each other: where, and how much. Values that are nan leave a gap.
        bands: by name of a curve, how far above and below each of its points a band reaches.
        ticks: of the horizontal axis, which is then logarithmic; without them it is linear and counts something.
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    ticks: Sequence[float] = field(default=())
    bands: Mapping[str, Sequence[float]] = field(default_factory=dict)


def plot_loss_by_position(
    losses: Mapping[str, torch.Tensor], training_length: int, path: Path, smooth: int = 128, title: str = ""
) -> None:
    """Draw one curve of mean loss over token position for each system.

    Args:
        losses: by the name of the system, nats [documents, length - 1] as `loss_by_position` returns.
        training_length: tokens of context in training, marked by a vertical line.
        path: of the PNG file; its folder is made where it is missing.
        smooth: neighbouring positions that are averaged into one point.
        title: above the picture.
    """
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for colour, (name, nll) in zip(itertools.cycle(COLOURS), losses.items(), strict=False):
        positions, means = smoothed_curve(nll, smooth)
        axes.plot(positions, means, label=name, color=colour, linewidth=2)
    axes.axvline(training_length, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        "length in training",
        (training_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        verticalalignment="top",
        fontsize=9,
    )
    axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)", title=title)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)
    plt.close(figure)


def plot_panels(rows: Sequence[Sequence[Panel]], path: Path, title: str = "") -> list[Path]:
    """Draw panels as one picture, PNG and SVG; a curve has the same colour in all of them.

    Args:
        rows: the panels of each row, as many in every row; the last one may have fewer.
        path: of the picture without its suffix; its folder is made where it is missing.
        title: above the picture.

    Returns:
        The files that were written, each whole or not at all.
    """
    figure, grid = plt.subplots(
        len(rows), len(rows[0]), figsize=(6.5 * len(rows[0]), 4.2 * len(rows)), layout="constrained", squeeze=False
    )
    names = dict.fromkeys(name for row in rows for panel in row for name in panel.curves)
    styles: dict[str, dict[str, Any]] = {
        name: {"color": COLOURS[n % len(COLOURS)], "linestyle": LINES[n // len(COLOURS) % len(LINES)]}
        for n, name in enumerate(names)
    }
    for axes, panel in itertools.zip_longest(grid.flat, itertools.chain.from_iterable(rows)):
        if panel is None:
            axes.set_visible(False)
        else:
            _draw_panel(axes, panel, styles)
    handles = [plt.Line2D([], [], linewidth=2, **style) for style in styles.values()]
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    figure.suptitle(title)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    for file in files:
        _save(figure, file)
    plt.close(figure)
    return files


def smoothed_curve(nll: torch.Tensor, smooth: int) -> tuple[list[float], list[float]]:
    """Mean over documents and over `smooth` neighbouring positions, and the middle of those positions.

    The last point averages what is left over, if that is at least half of `smooth`.
    """
    pieces = nll.mean(dim=0).split(smooth)
    if len(pieces) > 1 and len(pieces[-1]) < smooth / 2:
        pieces = pieces[:-1]
    # Column t is the loss of the token at position t + 1.
    positions = [1 + index * smooth + (len(piece) - 1) / 2 for index, piece in enumerate(pieces)]
    return positions, [piece.mean().item() for piece in pieces]


def _draw_panel(axes: plt.Axes, panel: Panel, styles: Mapping[str, dict]) -> None:
    for name, (positions, values) in panel.curves.items():
        # One point alone makes no line.
        marker = "o" if len(panel.ticks) or len(positions) == 1 else None
        axes.plot(positions, values, linewidth=2, marker=marker, markersize=4, label=name, **styles[name])
        if name in panel.bands:
            low, high = zip(*((v - b, v + b) for v, b in zip(values, panel.bands[name], strict=True)), strict=True)
            axes.fill_between(positions, low, high, color=styles[name]["color"], alpha=0.2, linewidth=0)
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(panel.ticks, [f"{tick:,}" for tick in panel.ticks])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: plt.Figure, path: Path) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
