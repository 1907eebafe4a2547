"""Peak memory of a training step and of reading, with and without learning.

Each variant runs in a process of its own, because a process never gives its peak back.
"""

import contextlib
import dataclasses
import re
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .speed import SpeedSizes, reading, training_step


def measure_memory(sizes: SpeedSizes, device: str = "cpu") -> dict[str, int]:
    """Bytes that each variant needs at its peak, beyond what the process held with model and input loaded.

    Reading is measured at the length in `sizes` and at four times that.

    Returns:
        Bytes by the name of the variant. On the CPU this is resident memory, exact to some megabytes.
    """
    longer = dataclasses.replace(sizes, length=4 * sizes.length)
    variants = {
        "training step, plain": (sizes, "train", False, False),
        "training step, learning": (sizes, "train", True, False),
        "training step, plain, checkpointing": (sizes, "train", False, True),
        "training step, learning, checkpointing": (sizes, "train", True, True),
        f"reading {sizes.length} tokens, learning": (sizes, "read", True, False),
        f"reading {longer.length} tokens, learning": (longer, "read", True, False),
    }
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        futures = {name: processes.submit(peak_growth, *variant, device) for name, variant in variants.items()}
        return {name: future.result() for name, future in tqdm(futures.items(), desc="Measuring memory")}


def peak_growth(sizes: SpeedSizes, work: str, learn: bool, checkpoint: bool, device: str) -> int:
    """Bytes by which one pass raises this process's peak; `work` is "train" or "read"."""
    torch.set_num_threads(1)
    model, input_ids = sizes.build(device), sizes.input_ids(device)
    forget_peak()
    before = peak_bytes(device)
    if work == "train":
        training_step(model, input_ids, learn, checkpoint)
    else:
        reading(model, input_ids, learn)
    return peak_bytes(device) - before


def forget_peak() -> None:
    """Let Linux count resident memory anew from what there is; the imports' own peak would hide that of the work."""
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
