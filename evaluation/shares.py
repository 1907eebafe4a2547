"""One measurement by several processes: documents are shared out by whole batches, and put together in their order.

A batch is the same whoever reads it, so that the numbers are those of one process (with as many threads).
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..training.agreement import of_one_process
from .subject import Subject
from .tasks import Task, TaskData

# One process may measure for long while the others wait; the default is half an hour, ten minutes on GPUs.
LONGEST_WAIT = timedelta(days=7)


def running_processes() -> PartialState | None:
    """The processes that torchrun or accelerate launch has started, this one among them; None for one alone."""
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    return state if state.num_processes > 1 else None


def own_share(count: int, batch_size: int, process: int, processes: int) -> list[int]:
    """The numbers, of `count`, that one process measures: every batch whose turn is its own."""
    return [number for number in range(count) if number // batch_size % processes == process]


def measure_together(
    processes: PartialState, task: Task, subject: Subject, data: TaskData, length: int, settings: Any
) -> dict:
    """The numbers of one point, as `Task.measure` gives them, on every process."""
    if task.by_one_process:
        return of_one_process(processes.is_main_process, lambda: task.measure(subject, data, length, settings))
    count = data.count(settings)
    own = own_share(count, data.batch_size, processes.process_index, processes.num_processes)
    parts = list(task.parts(subject, data.only(own), length, settings)) if own else []
    found = dict(pair for share in gather_object([list(zip(own, parts, strict=True))]) for pair in share)
    return task.numbers(_together([found[number] for number in range(count)]), settings)


def _together(parts: Sequence) -> Any:
    return torch.stack(list(parts)) if isinstance(parts[0], torch.Tensor) else parts
