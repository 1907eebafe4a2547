"""The benchmark runs every system; its numbers are not judged here."""

import ctypes
import dataclasses
import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ttt_e2e.benchmarks import Works, measure_memory, measure_times, report, tables, write_report
from ttt_e2e.benchmarks.memory import peak_growth
from ttt_e2e.benchmarks.report import ratio
from ttt_e2e.benchmarks.speed import Work
from ttt_e2e.benchmarks.systems import ON, SYSTEMS, ModelSizes, build
from ttt_e2e.cli.main import app

from ..scripts import load_script

SMALL = ModelSizes(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_suffix_layers=1,
    mini_batch_size=4,
    sliding_window=8,
)
KINDS = ("train", "read", "decode", "generate", "further")


def small(work: Work) -> Work:
    return Work(work.kind, 16, work.rows, min(work.tokens, 5), work.checkpointing, work.rounds and 1, work.quick)


def small_works() -> Works:
    works = Works.read()
    timed, memory = ({name: small(own) for name, own in some.items()} for some in (works.timed, works.memory))
    return Works(SMALL, timed, memory)


@pytest.mark.slow
def test_all_works_are_timed_and_reported(tmp_path):
    threads, works = torch.get_num_threads(), small_works()
    assert {work.kind for work in works.timed.values()} == set(KINDS)
    times = measure_times(works, rounds=2)
    assert torch.get_num_threads() == threads
    for name, work in works.timed.items():
        assert list(times[name]) == list(SYSTEMS)
        assert all(len(own) == (work.rounds or 2) for own in times[name].values())
        assert work.kind == "further" or all(second > 0 for own in times[name].values() for second in own)
    memory = {name: dict.fromkeys(SYSTEMS, 2**20) for name in works.memory}
    measured = report(works, times, memory, "ttt-e2e bench")
    write_report(measured, tmp_path / "bench")
    assert json.loads((tmp_path / "bench" / "bench.json").read_text()) == measured
    shown = (tmp_path / "bench" / "bench.md").read_text()
    assert all(f"| {name} |" in shown for name in works.timed) and "ttt-e2e bench" in shown
    assert (tmp_path / "bench" / "bench.png").is_file()
    assert [len(table.rows) for table in tables(measured)] == [len(works.timed), len(works.memory)]


def test_systems_have_about_as_many_parameters():
    sizes = Works.read().sizes
    counts = {system: build(system, sizes, "meta").num_parameters() for system in SYSTEMS}
    assert max(counts.values()) < 1.01 * min(counts.values())


def test_ratios_are_taken_within_rounds():
    assert ratio([1.0, 4.0, 3.0], [1.0, 2.0, 2.0]) == "1.50 ± 0.50" and ratio([3.0], [2.0]) == "1.50"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_longer_text_raises_the_peak(system):
    """64 MiB of logits alone, which pages that Linux has not counted yet cannot hide.

    What earlier tests have freed goes back first: this process may hold it, and take it again without growing.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    threads, sizes = torch.get_num_threads(), dataclasses.replace(SMALL, vocab_size=2**13)
    try:
        assert peak_growth(sizes, system, Work("train", 1024, 2), "cpu") > 2**25
        assert peak_growth(sizes, system, Work("read", 16, 1), "cpu") < 2**25
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc is told what to give back")
def test_the_peak_is_what_is_held_and_checkpointing_lowers_it():
    sizes = dataclasses.replace(SMALL, hidden_size=128, intermediate_size=256, mini_batch_size=16, sliding_window=64)
    kept, checkpointed = Work("train", 1024, 1), Work("train", 1024, 1, checkpointing=True)
    memory = measure_memory(Works(sizes, {}, {"kept": kept, "checkpointed": checkpointed}))
    assert 0 < memory["checkpointed"][ON] < 0.3 * memory["kept"][ON]  # 64 inner steps, of which 8 are there at once


def test_the_command_writes_what_it_shows(tmp_path, monkeypatch):
    works = small_works()
    monkeypatch.setattr(Works, "read", classmethod(lambda cls, quick: works))
    monkeypatch.setattr("ttt_e2e.benchmarks.measure_memory", lambda works, device: {})
    result = CliRunner().invoke(app, ["bench", "--quick", "--rounds", "1", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["command"].startswith("ttt-e2e bench --quick")


def test_the_pages_say_what_was_measured(monkeypatch, capsys):
    tool = Path(__file__).parents[2] / "tools" / "speed_tables.py"
    module = load_script(tool)
    monkeypatch.setattr(sys, "argv", ["speed_tables.py", "--check"])
    assert module.main() == 0, capsys.readouterr()
