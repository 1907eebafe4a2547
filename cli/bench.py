"""`ttt-e2e bench`: what learning while reading costs on this machine."""

from typing import Annotated

import typer


def bench(
    rounds: Annotated[int, typer.Option(help="Repetitions; the median is shown.", min=1)] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time a training step, reading and decoding against the same model without learning (about 2 minutes).

    On the CPU: CPU time of one thread, in float32, with the sizes that the README names.
    """
    from rich.console import Console

    from ..benchmarks import SpeedSizes, measure_decoding, measure_passes
    from ..evaluation import Table

    sizes = SpeedSizes()
    passes = measure_passes(sizes, rounds, device)
    few, many = 4, 64
    decoding = measure_decoding(sizes, rounds, (few, many), device)
    references = {
        "training step": passes["training step, plain"],
        "reading": passes["reading, plain"],
        "decoding": decoding[f"decoding after {few} mini-batches"],
    }
    rows = [
        [
            name,
            f"{seconds * 1000:.1f}",
            f"{seconds / next(references[key] for key in references if name.startswith(key)):.2f}",
        ]
        for name, seconds in {**passes, **decoding}.items()
    ]
    title = ", ".join(f"{name} {value}" for name, value in vars(sizes).items())
    table = Table(title, ["what (decoding: per token)", "milliseconds", "ratio to the first"], rows)
    Console().print(table.rich())
