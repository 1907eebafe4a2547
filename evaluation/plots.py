"""Pictures of evaluation results."""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: works without a display
import matplotlib.pyplot as plt
import torch

# Colour-blind safe (Okabe and Ito), the system under study first.
COLOURS = ["#0072B2", "#56B4E9", "#E69F00", "#555555", "#CC79A7", "#009E73"]


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
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)
    plt.close(figure)


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


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)
