"""Latency and memory against context length (arXiv 2512.23675, Figure 1 right).

The model reads and writes with `generate`, as its users do; random tokens will do, because no model reads some tokens
faster than others.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .decoding_loss import write_tokens
from .subject import Subject

CACHE_NAMES = ("cache", "state", "mems")


def latency(
    subject: Subject,
    length: int,
    new_tokens: int,
    rows: int = 1,
    repeats: int = 3,
    row_lengths: Sequence[int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float | int]:
    """Time to read a context of `length` tokens and to write `new_tokens` tokens after it, and the memory of both.

    A model that learns while it reads takes an inner step whenever a mini-batch is full: `new_tokens` should be a
    multiple of its mini-batch, so that writing bears its share of these steps.

    Args:
        length: tokens of context in every row.
        new_tokens: tokens written in every row, one after another.
        rows: sequences side by side.
        repeats: measurements, of which the median counts; one more comes first, to warm up and to measure memory.
        row_lengths: tokens of each row instead of `rows` times `length`, the longest of which is `length`; shorter
            rows are padded on the left. Padding is not counted.
        clock: seconds. The GPU's work is awaited before each reading of it.

    Returns:
        `prefill_seconds_per_1k_tokens`: to read, over all rows' tokens; `decode_milliseconds_per_token`: from one
        token of a row to its next; `decode_tokens_per_second`: over all rows; `tokens`: read in all rows;
        `peak_memory_bytes`: what torch's allocator (that of the GPU, or of the CPU) holds at most beyond model and
        input; `cache_bytes`: what is kept of the context after the last token (keys and values, recurrent states,
        learned weights); `model_bytes`.

    Raises:
        ValueError: a number is not positive, or `row_lengths` do not fit `length`.
    """
    lengths = [length] * rows if row_lengths is None else list(row_lengths)
    given = {"length": length, "new_tokens": new_tokens, "rows": rows, "repeats": repeats}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if min(lengths, default=0) < 1 or max(lengths) != length:
        raise ValueError(f"row_lengths={lengths}: must be positive, and the largest must be length={length}")
    ids, mask = _random_rows(subject, lengths)
    with peak_memory(subject.model.device) as peak:
        output = write_tokens(subject, ids, new_tokens + 1, mask, do_sample=False)
    kept = cache_bytes(output)
    del output
    reading, writing = [], []
    for _ in tqdm(range(repeats), desc=f"{subject.label}, {length:,} tokens", unit=" runs"):
        with forward_times(subject.model, clock) as times:
            write_tokens(subject, ids, new_tokens + 1, mask, do_sample=False)
        # The last forward that reads the context gives the first new token, every later one another.
        last_read = len(times) - 1 - new_tokens
        reading.append(times[last_read][1] - times[0][0])
        writing.append((times[-1][1] - times[last_read][1]) / new_tokens)
    step = median(writing)
    return {
        "prefill_seconds_per_1k_tokens": median(reading) / (sum(lengths) / 1000),
        "decode_milliseconds_per_token": step * 1000,
        "decode_tokens_per_second": len(lengths) / step,
        "tokens": sum(lengths),
        "peak_memory_bytes": peak[0],
        "cache_bytes": kept,
        "model_bytes": subject.model.get_memory_footprint(),
    }


@contextmanager
def forward_times(model: PreTrainedModel, clock: Callable[[], float]):
    """A list that gets [start, end] of each of the model's forward passes within the context."""
    times = []

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return clock()

    def end(*_) -> None:
        times[-1].append(now())

    hooks = [
        model.register_forward_pre_hook(lambda *_: times.append([now()])),
        model.register_forward_hook(end),
    ]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def peak_memory(device: torch.device):
    """A list that holds, after the context, the most bytes that were allocated within it beyond those before it.

    Bytes are those of torch's allocator: on the GPU its own count, on the CPU a profile of all allocations.
    """
    peak = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes two lines to the terminal each time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield peak
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    peak.append(most)


def cache_bytes(output) -> int:
    """Bytes of the cache in an output of `generate`, shared storage counted once; 0 where there is none."""
    cache = next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    held = getattr(cache, "layers", cache)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(held)}
    return sum(storages.values())


def _tensors(value) -> Iterable[torch.Tensor]:
    """All tensors in lists, mappings and the attributes of cache layers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _random_rows(subject: Subject, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [rows, longest] and the mask of the tokens; shorter rows stand on the right."""
    shape = len(lengths), max(lengths)
    ids = torch.randint(subject.vocabulary_size, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(shape[1]) >= shape[1] - torch.tensor(lengths)[:, None]
    device = subject.model.device
    return ids.to(device), mask.long().to(device)
