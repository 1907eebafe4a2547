"""What a GPU makes of the 125M model: training, reading, decoding and memory, beside stock transformers; see gpu.yaml.

python -m ttt_e2e.benchmarks.gpu --output benchmarks/results
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from tqdm.auto import tqdm

from ..attention import TWICE_DIFFERENTIABLE, attention_mask
from ..evaluation.results import environment
from ..evaluation.tables import Table
from ..storage.disk import write_text
from ..triton_attention import VisibleKeys, triton_attention, why_not
from ..twice_differentiable import twice_differentiable_attention
from .memory import forget_peak, peak_bytes
from .speed import Work, elapsed, input_ids, timed
from .systems import GPU_SYSTEMS, ModelSizes, build

GPU_FILE = Path(__file__).with_name("gpu.yaml")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class AttentionWork:
    """Attention of one inner step: see gpu.yaml."""

    heads: int
    key_heads: int
    queries: int
    past: int
    window: int
    channels: int


@dataclass(frozen=True)
class GPUWorks:
    """The contents of gpu.yaml."""

    sizes: ModelSizes
    precision: str
    rounds: int
    works: Mapping[str, Work]
    attention: Mapping[str, AttentionWork]

    @classmethod
    def read(cls) -> "GPUWorks":
        found = yaml.safe_load(GPU_FILE.read_text(encoding="utf-8"))
        works = {name: Work(**own) for name, own in found["works"].items()}
        attention = {name: AttentionWork(**own) for name, own in found["attention"].items()}
        return cls(ModelSizes(**found["sizes"]), found["precision"], found["rounds"], works, attention)


def measure(works: GPUWorks, device: str, minutes: float) -> dict:
    """All that the time allows.

    Returns:
        By work and system `seconds`, one number per round, and `memory_bytes`, the peak beyond the model; both hold
        `OUT_OF_MEMORY` where the device had too little. `attention`, likewise by size and implementation. `left_out`:
        works that there was no time for. `unavailable`: systems that cannot run here, and why.
    """
    deadline = time.monotonic() + 60 * minutes
    measured: dict = {"seconds": {}, "memory_bytes": {}, "attention": {}, "left_out": [], "unavailable": {}}
    for size, attention in works.attention.items():
        measured["attention"][size] = dict(attention_times(attention, device, works.rounds))
    models = {}
    for system in GPU_SYSTEMS:
        reason = unavailable(system, works, device)
        if reason is None:
            models[system] = build(system, works.sizes, device)
        else:
            measured["unavailable"][system] = reason
    for name, work in works.works.items():
        if time.monotonic() > deadline:
            measured["left_out"].append(name)
            continue
        ids, seconds, memory = input_ids(works.sizes, work, device), {}, {}
        for system, model in tqdm(models.items(), desc=name, unit=" systems"):
            with precision(works, device):
                seconds[system], memory[system] = measured_run(
                    timed(system, model, ids, work, device), works.rounds, device
                )
        measured["seconds"][name], measured["memory_bytes"][name] = seconds, memory
    return measured


def unavailable(system: str, works: GPUWorks, device: str) -> str | None:
    """Why a system cannot run on the device."""
    changes = GPU_SYSTEMS[system].changes
    if changes.get("inner_attention") == "triton":
        channels = works.sizes.hidden_size // works.sizes.num_attention_heads
        return why_not(torch.device(device), getattr(torch, works.precision), channels)
    if changes.get("attn_implementation") == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        return None if is_flash_attn_2_available() else "flash-attn is not installed, or there is no GPU"
    return None


def precision(works: GPUWorks, device: str):
    """Autocast to the precision of the works."""
    dtype = getattr(torch, works.precision)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)


def measured_run(run: Callable[[], float], rounds: int, device: str) -> tuple[list[float] | str, int | str]:
    """Seconds of each round, after one to warm up, and bytes of the peak beyond what was held before."""
    try:
        run()
        forget_peak(device)
        before = peak_bytes(device)
        return [run() for _ in range(rounds)], max(0, peak_bytes(device) - before)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return OUT_OF_MEMORY, OUT_OF_MEMORY


def attention_times(work: AttentionWork, device: str, rounds: int) -> Iterator[tuple[str, dict]]:
    """Seconds and peak of output, gradients and their gradients, by implementation of the inner attention."""
    dtype, read = torch.bfloat16, (work.past,)
    shapes = [(1, work.heads, work.queries, work.channels)]
    shapes += 2 * [(1, work.key_heads, work.past + work.queries, work.channels)]
    tensors = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]
    place, scale, groups = torch.device(device), work.channels**-0.5, work.heads // work.key_heads
    sizes = (work.window, work.past, work.queries, read, place)

    def plain(query, key, value):
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        mask: Any = attention_mask(TWICE_DIFFERENTIABLE, *sizes)
        return twice_differentiable_attention(query, key, value, mask, scale)

    def kernels(query, key, value):
        return triton_attention(query, key, value, VisibleKeys.of(*sizes, num_sinks=0), scale)

    for name, attend in (("torch", plain), ("triton", kernels)):
        if name == "triton" and why_not(place, dtype, work.channels) is not None:
            continue

        def both_derivatives(attend=attend):
            first = torch.autograd.grad(attend(*tensors).float().square().sum(), tensors, create_graph=True)
            squares = torch.stack([grad.float().square().sum() for grad in first])
            torch.autograd.grad(squares.sum(), tensors)

        seconds, memory = measured_run(partial(elapsed, both_derivatives, device), rounds, device)
        yield name, {"seconds": seconds, "memory_bytes": memory}


def gpu_tables(measured: Mapping) -> list[Table]:
    """Milliseconds and MiB, by work and system."""
    systems = [name for name in GPU_SYSTEMS if name not in measured["unavailable"]]

    def milliseconds(seconds: list[float] | str) -> str:
        return seconds if isinstance(seconds, str) else f"{1000 * statistics.median(seconds):.1f}"

    def mebibytes(memory: int | str) -> str:
        return memory if isinstance(memory, str) else f"{memory / 2**20:.0f}"

    def rows(part: str, shown: Callable) -> list[list[str]]:
        return [[name, *(shown(own[system]) for system in systems)] for name, own in measured[part].items()]

    attention = [
        [size, name, milliseconds(own["seconds"]), mebibytes(own["memory_bytes"])]
        for size, by_name in measured["attention"].items()
        for name, own in by_name.items()
    ]
    return [
        Table("Milliseconds (decoding: per token)", ["", *systems], rows("seconds", milliseconds)),
        Table("Memory beyond the model, MiB", ["", *systems], rows("memory_bytes", mebibytes)),
        Table("Attention of one inner step, both derivatives", ["", "", "milliseconds", "MiB"], attention),
    ]


def measure_gpu(
    output: Annotated[Path | None, typer.Option(help="A folder for gpu.json and gpu.md.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no further work after so many minutes.", min=0)] = 6,
) -> None:
    """Time the 125M model on this machine's GPU, beside stock transformers."""
    from rich.console import Console

    if not torch.cuda.is_available():
        raise typer.BadParameter("no GPU here (torch.cuda.is_available() is False): `ttt-e2e bench` needs none.")
    works = GPUWorks.read()
    measured = measure(works, "cuda", minutes) | {
        "environment": environment() | {"gpu": torch.cuda.get_device_name()},
        "command": f"python -m ttt_e2e.benchmarks.gpu --minutes {minutes:g}",
        "sizes": asdict(works.sizes),
        "precision": works.precision,
    }
    for table in gpu_tables(measured):
        Console().print(table.rich())
    for system, reason in measured["unavailable"].items():
        print(f"Not measured: {system} ({reason}).")
    for name in measured["left_out"]:
        print(f"No time was left for: {name}.")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "gpu.json", json.dumps(measured, indent=1) + "\n")
        write_text(output / "gpu.md", "\n".join(f"{own.title}:\n\n{own.markdown()}" for own in gpu_tables(measured)))


if __name__ == "__main__":
    typer.run(measure_gpu)
