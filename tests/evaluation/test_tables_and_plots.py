"""Tables and pictures show what they are given."""

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from ttt_e2e.evaluation import Table, plot_loss_by_position
from ttt_e2e.evaluation.plots import Panel, plot_panels, smoothed_curve
from ttt_e2e.training.pictures import plot_training

TABLE = Table("title", ["", "ours"], [["parameters", "12,345"], ["positions 4-8", "1.250"]])


def test_markdown_table():
    assert TABLE.markdown().splitlines() == [
        "|  | ours |",
        "| --- | ---: |",
        "| parameters | 12,345 |",
        "| positions 4-8 | 1.250 |",
    ]


def test_terminal_table():
    console = Console(width=100)
    with console.capture() as shown:
        console.print(TABLE.rich())
    assert all(text in shown.get() for text in ("title", "ours", "12,345", "1.250", "4-8"))


def test_curve_points_lie_in_the_middle_of_what_they_average():
    nll = torch.arange(1.0, 11.0).repeat(3, 1)  # the loss of the token at position p is p
    positions, means = smoothed_curve(nll, smooth=4)
    assert positions == means == [2.5, 6.5, 9.5]
    assert smoothed_curve(nll[:, :9], smooth=4)[0] == [2.5, 6.5], "a short rest is left out"


def test_picture_is_written_whole(tmp_path):
    path = tmp_path / "new" / "picture.png"
    losses = {name: torch.rand(2, 300) for name in ("a", "b")}
    plot_loss_by_position(losses, training_length=100, path=path, smooth=32, title="title")
    assert matplotlib.image.imread(path).shape[:2] == (720, 1200)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


PICTURES = {
    "training": lambda path: plot_training([{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in (1, 2)], path),
    "loss by position": lambda path: plot_loss_by_position({"a": torch.rand(2, 3)}, 2, path, smooth=1),
    "panels": lambda path: plot_panels([[Panel("title", "position", "nats", {"a": ([0.5, 2.5], [1, 2])})]], path),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_what_is_counted_on_an_axis_is_whole(tmp_path, monkeypatch, picture):
    ticks, save = [], Figure.savefig

    def watch(figure, *arguments, **named):
        ticks.extend(tick for axes in figure.axes for tick in axes.get_xticks())
        save(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", watch)
    PICTURES[picture](tmp_path / "picture.png")
    assert ticks and all(float(tick).is_integer() for tick in ticks)
