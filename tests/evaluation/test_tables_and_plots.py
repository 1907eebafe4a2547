"""Tables and pictures show what they are given."""

import matplotlib.image
import torch
from rich.console import Console

from ttt_e2e.evaluation import loss_table, plot_loss_by_position
from ttt_e2e.evaluation.plots import smoothed_curve

SYSTEMS = [{"name": "ours", "parameters": 12345, "training_seconds": 6.7, "loss": 1.25, "loss_by_bucket": [1.5, 1.0]}]


def test_markdown_table():
    markdown = loss_table(SYSTEMS, [(0, 4), (4, 8)], "title").markdown()
    assert markdown.splitlines() == [
        "|  | ours |",
        "| --- | ---: |",
        "| parameters | 12,345 |",
        "| seconds of training | 7 |",
        "| positions 0-4 | 1.500 |",
        "| positions 4-8 | 1.000 |",
        "| all positions | 1.250 |",
    ]


def test_terminal_table():
    console = Console(width=100)
    with console.capture() as shown:
        console.print(loss_table(SYSTEMS, [(0, 4), (4, 8)], "title").rich())
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
