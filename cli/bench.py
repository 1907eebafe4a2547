"""`ttt-e2e bench`: what learning while reading costs on this machine."""

from pathlib import Path
from typing import Annotated

import typer


def bench(
    rounds: Annotated[int, typer.Option(help="Repetitions, of which long works take fewer.", min=1)] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="The most telling part, in about two minutes.")] = False,
    output: Annotated[Path | None, typer.Option(help="A folder for bench.json, bench.md and a picture.")] = None,
    ttt_layers: Annotated[bool, typer.Option("--ttt-layers", help="A TTT-Linear and a TTT-MLP layer instead.")] = False,
) -> None:
    """Time training steps, reading and decoding: stock transformers' models, and ours with learning off and on.

    Stock models are a Qwen3 with sliding-window and one with full attention, of as many parameters. On the CPU: CPU
    time of one thread, in float32, and the growth of resident memory. All systems take turns; ratios are medians over
    rounds, with half their range.
    """
    from rich.console import Console

    from ttt_e2e.benchmarks import Works, measure_memory, measure_times, report, tables, write_report

    if ttt_layers:
        _bench_ttt_layers(rounds, device)
        return
    works = Works.read(quick)
    memory = measure_memory(works, device)
    times = measure_times(works, rounds, device)
    command = f"ttt-e2e bench{' --quick' if quick else ''} --rounds {rounds} --device {device}"
    measured = report(works, times, memory, command)
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in measured["sizes"].items()))
    for table in tables(measured):
        console.print(table.rich())
    if output is not None:
        write_report(measured, output)
        console.print(f"The numbers are in {output}.")


def _bench_ttt_layers(rounds: int, device: str) -> None:
    """The dual form against the primal one, and time per token by length."""
    from rich.console import Console

    from ttt_e2e.benchmarks import TTTLayerSizes, measure_forms, measure_lengths
    from ttt_e2e.evaluation import Table

    sizes = TTTLayerSizes()
    forms, lengths = measure_forms(sizes, rounds, device), measure_lengths(sizes, rounds, device)
    dual = {name.rsplit(",", 1)[0]: seconds for name, seconds in forms.items() if name.endswith("dual form")}
    first = {name.split()[0]: seconds for name, seconds in reversed(lengths.items())}
    form_rows = [
        [name, f"{seconds * 1000:.0f}", f"{seconds / dual[name.rsplit(',', 1)[0]]:.2f}"]
        for name, seconds in forms.items()
    ]
    length_rows = [
        [name, f"{seconds * 1e6:.0f}", f"{seconds / first[name.split()[0]]:.2f}"] for name, seconds in lengths.items()
    ]
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in vars(sizes).items()))
    console.print(Table("Training step of one layer", ["", "milliseconds", "ratio to dual"], form_rows).rich())
    console.print(Table("TTT-Linear, per token", ["", "microseconds", "ratio to the first"], length_rows).rich())
