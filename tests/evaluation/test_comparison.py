"""Tables, differences and curves against values worked out by hand."""

import math
from types import SimpleNamespace

import matplotlib.image
import pytest

from ttt_e2e.evaluation import runs
from ttt_e2e.evaluation.comparison import (
    Quantity,
    comparison_panels,
    comparison_tables,
    difference_to,
    measured,
    position_means,
    standard_errors,
)
from ttt_e2e.evaluation.plots import COLOURS, Panel, plot_panels
from ttt_e2e.evaluation.results import Point

LOSS = Quantity("loss", "Loss", "nats", decimals=2)
CURVE = Quantity("curve", "Loss", "nats", decimals=1, by_position=True)


def point(label, length, **numbers):
    return Point("task", label, label, length, {}, numbers, {}, {})


POINTS = [
    point("ours", 8, loss=2.0),
    point("ours", 16, loss=1.5),
    point("theirs", 8, loss=2.25),
    point("theirs", 16, loss=2.5),
    point("third", 16, loss=None),
]


def test_tables_and_differences():
    losses, differences = comparison_tables(POINTS, [LOSS], "theirs")
    assert losses.header == differences.header == ["", "8", "16"]
    assert losses.rows == [["ours", "2.00", "1.50"], ["theirs", "2.25", "2.50"], ["third", "", "not finite"]]
    assert differences.rows == [["ours", "-0.25", "-1.00"], ["third", "", "not finite"]]
    assert "minus theirs" in differences.title
    assert len(comparison_tables(POINTS, [LOSS], None)) == 1


def test_lengths_without_the_baseline_have_no_difference():
    series = measured(POINTS[:3], LOSS)
    assert difference_to(series, "theirs") == {"ours": {8: -0.25}, "theirs": {8: 0.0}}


def test_scale_turns_bytes_into_what_is_shown():
    memory = Quantity("cache", "Memory", "MiB", scale=2**-20)
    assert measured([point("ours", 8, cache=3 * 2**20)], memory) == {"ours": {8: 3.0}}


def test_standard_error_is_that_of_the_differences_by_document():
    quantity = Quantity("loss", "Loss", "nats", by_document="documents")
    points = [
        point("ours", 8, loss=2.0, documents=[1.0, 3.0]),
        point("theirs", 8, loss=2.5, documents=[1.0, 4.0]),
    ]
    # The differences are 0 and -1: their deviation is sqrt(1/2), over sqrt(2) documents.
    assert standard_errors(points, quantity, "theirs") == {"ours": {8: pytest.approx(0.5)}}
    assert comparison_tables(points, [quantity], "theirs")[1].rows == [["ours", "-0.500 ± 0.500"]]


def test_tables_by_position_average_ranges_that_halve():
    points = [point("ours", 8, curve=[float(p) for p in range(1, 8)]), point("theirs", 8, curve=[1.0] * 7)]
    table, differences = comparison_tables(points, [CURVE], "theirs")
    assert table.header == ["", "1", "2-3", "4-7", "all"]
    assert table.rows == [["ours", "1.0", "2.5", "5.5", "4.0"], ["theirs", "1.0", "1.0", "1.0", "1.0"]]
    assert differences.rows == [["ours", "+0.0", "+1.5", "+4.5", "+3.0"]]


def test_means_of_positions_count_from_the_first():
    assert position_means([5.0, 7.0, 9.0], 0, [(0, 1), (1, 3)]) == [5.0, 8.0]
    assert position_means([5.0, 7.0, 9.0], 1, [(1, 2), (2, 4)]) == [5.0, 8.0]
    assert math.isnan(position_means([5.0], 1, [(3, 4)])[0])


def test_panels_hold_the_curves():
    ((losses, differences),) = comparison_panels(POINTS, [LOSS], "theirs")
    assert losses.curves["ours"] == ([8, 16], [2.0, 1.5]) and losses.ticks == [8, 16]
    assert differences.curves["ours"] == ([8, 16], [-0.25, -1.0])
    assert math.isnan(losses.curves["third"][1][0])


def test_panels_by_position_are_one_per_length_and_count_from_the_first_position():
    points = [point("ours", 4, curve=[3.0, 2.0, 1.0]), point("ours", 2, curve=[3.0])]
    ((short, long),) = comparison_panels(points, [CURVE], None)
    assert [panel.curves["ours"] for panel in (short, long)] == [([1], [3.0]), ([1, 2, 3], [3.0, 2.0, 1.0])]
    written = Quantity("curve", "Loss", "nats", by_position=True, first=0)
    assert comparison_panels(points[:1], [written], None)[0][0].curves["ours"][0] == [0, 1, 2]


def test_trainings_of_a_row_are_one_curve_with_a_band():
    points = [point("ours", 8, loss=2.0), point("ours, seed 1", 8, loss=4.0), point("ours", 16, loss=1.0)]
    points += [point("theirs", 8, loss=5.0), point("theirs", 16, loss=5.0)]
    trainings = {"ours": "ours", "ours, seed 1": "ours", "theirs": "theirs"}
    ((losses, differences),) = comparison_panels(points, [LOSS], "theirs", trainings)
    assert losses.curves == {"ours": ([8, 16], [3.0, 1.0]), "theirs": ([8, 16], [5.0, 5.0])}
    assert losses.bands == {"ours": [1.0, 0.0]}, "sqrt(2) / sqrt(2); one training has no error"
    assert differences.curves["ours"] == ([8, 16], [-2.0, -4.0])
    curves = [point("ours", 3, curve=[3.0, 2.0]), point("ours, seed 1", 3, curve=[1.0, None])]
    ((panel,),) = comparison_panels(curves, [CURVE], None, trainings)
    assert panel.curves["ours"][1][0] == 2.0 and math.isnan(panel.curves["ours"][1][1])


def test_long_curves_are_averaged_to_what_a_picture_can_show():
    ((panel,),) = comparison_panels([point("ours", 1001, curve=[1.0] * 1000)], [CURVE], None)
    assert len(panel.curves["ours"][0]) <= 64


def test_picture_is_written_as_png_and_svg(tmp_path):
    names = [f"system {n}" for n in range(len(COLOURS) + 1)]
    panel = Panel(
        "the title",
        "x",
        "y",
        {name: ([1, 2], [n, n]) for n, name in enumerate(names)},
        ticks=[1, 2],
        bands={"system 0": [0, 1]},
    )
    files = plot_panels([[panel, panel], [panel]], tmp_path / "new" / "results.v1", "above")
    assert [file.name for file in files] == ["results.v1.png", "results.v1.svg"]
    assert sorted(file.name for file in files[0].parent.iterdir()) == ["results.v1.png", "results.v1.svg"]
    assert matplotlib.image.imread(files[0]).shape[:2] == (1260, 1950)
    assert "<svg" in files[1].read_text()


def test_what_is_far_from_the_others_stands_in_the_table_alone(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(runs, "plot_panels", lambda panels, path, title: drawn.extend(panels) or [])
    evaluation = SimpleNamespace(
        request=SimpleNamespace(output=tmp_path, baseline=None, task="task"),
        results=SimpleNamespace(points=POINTS),
        task=SimpleNamespace(quantities=[LOSS]),
    )
    (table,), _ = runs.write_comparison(evaluation, tables_only={"theirs"})
    ((panel,),) = drawn
    assert [row[0] for row in table.rows] == ["ours", "theirs", "third"] and list(panel.curves) == ["ours", "third"]
