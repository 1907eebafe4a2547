"""Where the time of a training step, of reading and of decoding goes, beside what the arithmetic alone would take.

    python -m ttt_e2e.benchmarks.profile

Operations are PyTorch's, summed by kind. What a profiler adds is the more, the smaller the operations are: it tells
shares, and `ttt-e2e bench` the times.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from ..evaluation.tables import Table
from .speed import Works, elapsed, input_ids, reading, training_step, writing
from .systems import OFF, ON, STOCK_WINDOW, arguments, build

PROFILED = (STOCK_WINDOW, OFF, ON)
KINDS = {
    "matrix products": "mm bmm addmm baddbmm addbmm dot mv",
    "attention kernels, softmax": (
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward _softmax "
        "_softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp"
    ),
    "copies": "copy_ cat clone index index_select gather roll constant_pad_nd slice_backward index_put_ scatter_",
    "sums and products of elements": (
        "mul mul_ add add_ sub sub_ div neg pow square rsqrt rsqrt_ mean sum silu silu_backward addcmul addcmul_ exp "
        "where masked_fill masked_fill_ linalg_vector_norm threshold_backward"
    ),
}
OTHER, PYTHON = "other operations", "between operations: Python and dispatch"


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Seconds by kind of operation, and between operations, of one call; one call before it warms up."""
    run()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        run()
        total = time.perf_counter() - start
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names.split()}
    seconds: Counter[str] = Counter(dict.fromkeys([*KINDS, OTHER], 0.0))
    for event in profiler.key_averages():
        seconds[kind_of.get(event.key, OTHER)] += event.self_cpu_time_total * 1e-6
    return dict(seconds) | {PYTHON: max(0.0, total - sum(seconds.values()))}


def arithmetic_seconds(run: Callable[[], object], rate: float) -> float:
    """Seconds that the products of one call would take at `rate` floating-point operations per second."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / rate


def product_rate(size: int = 1024, rounds: int = 5) -> float:
    """Floating-point operations per second of the best of some float32 products of two matrices [size, size]."""
    one, other = torch.randn(2, size, size)
    return max(2 * size**3 / elapsed(partial(torch.mm, one, other), "cpu") for _ in range(rounds))


def profiled(works: Works) -> tuple[list[Table], float]:
    """A table for each of the quick works with products, and the rate of the limits."""
    rate = product_rate()
    models = {system: build(system, works.sizes, "cpu") for system in PROFILED}
    tables = []
    for name in ("training step, 1K", "reading 1K", "decoding"):
        work, columns = works.timed[name], {}
        ids = input_ids(works.sizes, work, "cpu")
        for system, model in tqdm(models.items(), desc=name, unit=" systems"):
            told = arguments(system)
            if work.kind == "train":
                run = partial(training_step, model, ids, work.checkpointing, told)
            else:
                run = (
                    partial(reading, model, ids, told)
                    if work.kind == "read"
                    else writing(model, ids, work.tokens, told)
                )
            each = work.tokens or 1
            columns[system] = {part: own / each for part, own in profile(run).items()}
            columns[system] |= {"all": sum(columns[system].values()), "products alone": arithmetic_seconds(run, rate)}
            columns[system]["products alone"] /= each
        parts = columns[PROFILED[0]]
        rows = [[part, *(f"{1000 * columns[system][part]:.2f}" for system in PROFILED)] for part in parts]
        tables.append(Table(f"{name}, milliseconds under the profiler", ["", *PROFILED], rows))
    return tables, rate


def show_profile(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the documentation has them.")] = False,
) -> None:
    """Show where the time of a training step, of reading 1K tokens and of decoding goes."""
    from rich.console import Console

    torch.set_num_threads(1)
    tables, rate = profiled(Works.read(quick=True))
    for table in tables:
        if markdown:
            print(f"{table.title}:\n\n{table.markdown()}")
        else:
            Console().print(table.rich())
    print(f"Products alone: as fast as one of two 1,024 x 1,024 matrices, {rate / 1e9:.0f} GFLOP/s.")


if __name__ == "__main__":
    typer.run(show_profile)
