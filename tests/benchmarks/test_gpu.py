"""The GPU's benchmark runs every system that it finds; here on the CPU, in small."""

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from ttt_e2e.benchmarks import gpu
from ttt_e2e.benchmarks.systems import GPU_SYSTEMS, ON, SYSTEMS

from .test_speed import SMALL, small


def small_works() -> gpu.GPUWorks:
    works = gpu.GPUWorks.read()
    attention = {"tiny": gpu.AttentionWork(heads=2, key_heads=1, queries=4, past=7, window=8, channels=8)}
    timed = {name: small(work) for name, work in works.works.items()}
    return gpu.GPUWorks(SMALL, works.precision, 1, timed, attention)


def test_all_works_are_measured_on_all_systems_that_can_run():
    works = small_works()
    measured = gpu.measure(works, "cpu", minutes=10)
    missing = {"stock, full attention, flash-attn", "learning on, Triton"}
    assert set(measured["unavailable"]) == missing and not measured["left_out"]
    for name in works.works:
        assert set(measured["seconds"][name]) == set(GPU_SYSTEMS) - missing
        assert all(second > 0 for own in measured["seconds"][name].values() for second in own)
    assert measured["attention"]["tiny"]["torch"]["seconds"][0] > 0
    assert [len(table.rows) for table in gpu.gpu_tables(measured)] == [len(works.works), len(works.works), 1]


def test_what_there_is_no_time_for_is_named():
    works = small_works()
    measured = gpu.measure(works, "cpu", minutes=0)
    assert measured["left_out"] == list(works.works) and not measured["seconds"]


def test_a_full_memory_is_a_result(monkeypatch):
    def timed(system, *others):
        def run():
            if system == ON:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 1.0

        return run

    monkeypatch.setattr(gpu, "timed", timed)
    works = dataclasses.replace(small_works(), works={"training": small_works().works["training step, 8K"]})
    measured = gpu.measure(works, "cpu", minutes=10)
    assert measured["seconds"]["training"] == {
        system: gpu.OUT_OF_MEMORY if system == ON else [1.0] for system in (*SYSTEMS, "learning on, first order")
    }
    assert gpu.OUT_OF_MEMORY in gpu.gpu_tables(measured)[0].markdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so():
    from typer import Typer

    app = Typer()
    app.command()(gpu.measure_gpu)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2 and "no GPU here" in result.output
