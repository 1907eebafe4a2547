"""`ttt-e2e bench`: what learning while reading costs on this machine."""

from typing import Annotated

import typer


def bench(
    rounds: Annotated[int, typer.Option(help="Repetitions; the median is shown.", min=1)] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    ttt_layers: Annotated[bool, typer.Option("--ttt-layers", help="A TTT-Linear and a TTT-MLP layer instead.")] = False,
) -> None:
    """Measure a training step, reading and decoding against the same model without learning (about 3 minutes).

    On the CPU: CPU time of one thread, in float32, and the growth of resident memory. The sizes stand above the tables.
    """
    from rich.console import Console

    from ttt_e2e.benchmarks import SpeedSizes, measure_decoding, measure_memory, measure_passes
    from ttt_e2e.evaluation import Table

    if ttt_layers:
        _bench_ttt_layers(rounds, device)
        return
    sizes = SpeedSizes()
    memory = measure_memory(sizes, device)
    passes = measure_passes(sizes, rounds, device)
    few, many = 4, 64
    decoding = measure_decoding(sizes, rounds, (few, many), device)
    references = {
        "training step": passes["training step, plain"],
        "reading": passes["reading, plain"],
        "decoding": decoding[f"decoding after {few} mini-batches"],
    }

    def ratio(name: str, seconds: float) -> str:
        return f"{seconds / next(references[what] for what in references if name.startswith(what)):.2f}"

    timed = {**passes, **decoding}
    speed_rows = [[name, f"{seconds * 1000:.1f}", ratio(name, seconds)] for name, seconds in timed.items()]
    memory_rows = [[name, f"{size / 2**20:.0f}"] for name, size in memory.items()]
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in vars(sizes).items()))
    console.print(Table("Time (decoding: per token)", ["", "milliseconds", "ratio to the first"], speed_rows).rich())
    console.print(Table("Memory at the peak, beyond model and input", ["", "MiB"], memory_rows).rich())


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
