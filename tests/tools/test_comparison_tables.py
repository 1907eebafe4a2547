"""README and docs say of the long documents what their report says."""

import sys

from ttt_e2e.evaluation.tables import Table

from ..scripts import load_script
from .packaged import ROOT

TOOL = load_script(ROOT / "tools" / "comparison_tables.py")


def test_the_pages_say_what_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["comparison_tables.py", "--check"])
    assert TOOL.main() == 0, capsys.readouterr()


def test_the_lowest_loss_of_a_system_is_bold():
    header = ["", "training tokens", "CPU seconds", "512", "8,192", "bits per byte", ""]
    rows = [
        ["sliding window", "2,000,000", "9", "2.500 ± 0.1", "2.700", "1.5", "better"],
        ["TTT-E2E", "2,000,000", "9", "2.600", "2.100 ± 0.2", "1.2", "better"],
        ["TTT-E2E, learning off", "2,000,000", "9", "2.000", "2.000", "1.2", "better"],
        ["5-gram", "", "", "3.000", "3.100", "1.9", ""],
    ]
    assert TOOL.summary(Table("", header, rows)).rows == [
        ["sliding window", "2.0M", "**2.500**", "2.700"],
        ["**TTT-E2E**", "2.0M", "2.600", "**2.100**"],
        ["TTT-E2E, learning off", "2.0M", "2.000", "2.000"],
        ["5-gram model of the same text", "", "3.000", "3.100"],
    ]
    report = Table("", header, rows).markdown() + "\n- a sentence\n\n| claim | answer |\n| --- | --- |\n"
    assert TOOL.report_table("# Title\n\n" + report) == Table("", header, rows)
