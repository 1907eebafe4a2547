"""The page on scaling says of memory what the estimator says now."""

import re
import runpy

import pytest

from .packaged import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "scaling_table.py"))
LINES = TOOL["PAGE"].read_text().partition("<!-- scaling: begin")[2].partition("<!-- scaling: end")[0].splitlines()
CELLS = [re.split(r" *\| *", line.strip("| ")) for line in LINES if line.startswith("| ") and "---" not in line]


def test_every_size_is_there_at_both_lengths():
    assert CELLS[0] == list(TOOL["HEADER"])
    names = [f"{size}, {length}" for length in ("8K", "128K") for size in TOOL["SIZES"]]
    assert [cells[0] for cells in CELLS[1:]] == names


@pytest.mark.parametrize(("size", "recipe", "line"), [("125m", "pretrain-8k", 1), ("3b", "extend-128k", 10)])
def test_memory_is_the_estimators(size, recipe, line):
    row = TOOL["table_row"](size, recipe, counted=False)
    assert row[:8] == CELLS[line][:8]
