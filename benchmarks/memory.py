"""Peak memory of training steps and of reading.

Each system does each work in a process of its own, because a process never gives its peak back.
"""

import contextlib
import os
import re
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from tqdm.auto import tqdm

from .speed import Work, Works, input_ids, reading, training_step
from .systems import SYSTEMS, ModelSizes, arguments, build

# From so many bytes on glibc gives a freed piece back at once. By default it keeps pieces of up to 32 MiB and cuts them
# up, so that a process grows by three times of what a training step with checkpointing holds.
LARGE_PIECE = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


def measure_memory(works: Works, device: str = "cpu") -> dict[str, dict[str, int]]:
    """Bytes at the peak by work and system, beyond what the process held with model and input loaded.

    On the CPU this is resident memory, exact to some megabytes, where freed memory is given back at once.
    """
    asked = [(name, system, work) for name, work in works.memory.items() for system in SYSTEMS]
    measured: dict[str, dict[str, int]] = {name: {} for name in works.memory}
    with (
        mock.patch.dict(os.environ, LARGE_PIECE),  # a process reads it when it begins
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes,
    ):
        futures = [processes.submit(peak_growth, works.sizes, system, work, device) for _, system, work in asked]
        for (name, system, _), future in zip(asked, tqdm(futures, desc="Measuring memory"), strict=True):
            measured[name][system] = future.result()
    return measured


def peak_growth(sizes: ModelSizes, system: str, work: Work, device: str) -> int:
    """Bytes by which a training step, or reading, raises this process's peak."""
    torch.set_num_threads(1)
    model, ids, told = build(system, sizes, device), input_ids(sizes, work, device), arguments(system)
    forget_peak(device)
    before = peak_bytes(device)
    if work.kind == "train":
        training_step(model, ids, work.checkpointing, told)
    else:
        reading(model, ids, told)
    # Linux counts pages in batches, so that small works may seem to free some.
    return max(0, peak_bytes(device) - before)


def forget_peak(device: str) -> None:
    """Let the GPU, or Linux for resident memory, count anew from what there is; what came before may hide the work."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Largest memory so far: allocated on the GPU, or resident in main memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # unlike the count of getrusage, that of this program alone, not of the one that started it
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text()).group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
