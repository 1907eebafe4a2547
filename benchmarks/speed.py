"""Seconds of training steps, reading and decoding: stock transformers' models and ours, with learning off and on.

Times are CPU seconds of one thread (seconds of the device on a GPU). All systems take turns in every round, so that a
busy machine slows them alike; ratios are taken within rounds.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .systems import SYSTEMS, ModelSizes, arguments, build

WORKS_FILE = Path(__file__).parent / "works.yaml"


@dataclass(frozen=True)
class Work:
    """What is timed; see works.yaml.

    Attributes:
        kind: train, read, decode, generate or further.
        length: tokens that are read, in each of `rows` rows.
        tokens: that are written.
        rounds: at most so many; None for as many as are asked for.
    """

    kind: str
    length: int
    rows: int
    tokens: int = 0
    checkpointing: bool = False
    rounds: int | None = None
    quick: bool = False


@dataclass(frozen=True)
class Works:
    """The contents of works.yaml: sizes, what is timed, and of what the peak memory is measured."""

    sizes: ModelSizes
    timed: Mapping[str, Work]
    memory: Mapping[str, Work]

    @classmethod
    def read(cls, quick: bool = False) -> "Works":
        """All of it, or its quick part."""
        found = yaml.safe_load(WORKS_FILE.read_text(encoding="utf-8"))
        timed, memory = (
            {name: work for name, own in found[part].items() if (work := Work(**own)).quick or not quick}
            for part in ("works", "memory")
        )
        return cls(ModelSizes(**found["sizes"]), timed, memory)


def measure_times(works: Works, rounds: int, device: str = "cpu") -> dict[str, dict[str, list[float]]]:
    """Seconds by work and system, one number per round."""
    models = {system: build(system, works.sizes, device) for system in SYSTEMS}
    measured = {}
    for name, work in works.timed.items():
        ids = input_ids(works.sizes, work, device)
        runs = {system: timed(system, model, ids, work, device) for system, model in models.items()}
        measured[name] = in_turns(runs, min(rounds, work.rounds or rounds), name)
    return measured


def in_turns(runs: Mapping[str, Callable[[], float]], rounds: int, name: str) -> dict[str, list[float]]:
    """What each function returns in `rounds` rounds of all of them, after one round to warm up; by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {system: [] for system in runs}
    try:
        for number in tqdm(range(rounds + 1), desc=name, unit=" rounds"):
            for system, run in runs.items():
                taken = run()
                if number > 0:
                    seconds[system].append(taken)
    finally:
        torch.set_num_threads(threads)
    return seconds


def timed(system: str, model: PreTrainedModel, ids: torch.Tensor, work: Work, device: str) -> Callable[[], float]:
    """A function that does a work and returns its seconds, or those per token."""
    told = arguments(system)
    if work.kind == "train":
        return partial(elapsed, partial(training_step, model, ids, work.checkpointing, told), device)
    if work.kind == "read":
        return partial(elapsed, partial(reading, model, ids, told), device)
    if work.kind == "decode":
        return partial(decoding_seconds, model, ids, work.tokens, told, device)
    if work.kind == "generate":
        return partial(elapsed, partial(generating, model, ids, work.tokens, told), device)
    return partial(further_seconds, model, ids, work.tokens, told, device)


def input_ids(sizes: ModelSizes, work: Work, device: str) -> torch.Tensor:
    """Random token ids [rows, length]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(sizes.vocab_size, (work.rows, work.length), generator=generator).to(device)


def elapsed(run: Callable[[], object], device: str) -> float:
    """Seconds that one call takes: CPU time of this process, or wall-clock time until the GPU is done."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def training_step(model: PreTrainedModel, ids: torch.Tensor, checkpointing: bool, told: Mapping) -> None:
    """Forward and backward; the optimiser's step is the same for all and left out."""
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_disable()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **told).loss.backward()


@torch.no_grad()
def reading(model: PreTrainedModel, ids: torch.Tensor, told: Mapping):
    """The cache of a prompt that is read as generation reads it, for the last logits only."""
    model.eval()
    return model(ids, use_cache=True, logits_to_keep=1, **told).cache


def writing(model: PreTrainedModel, ids: torch.Tensor, tokens: int, told: Mapping) -> Callable[[], None]:
    """A function that writes `tokens` tokens one by one, greedily, behind a prompt that is read here."""
    cache = reading(model, ids, told)

    @torch.no_grad()
    def write() -> None:
        token = ids[:, -1:]
        for _ in range(tokens):
            token = model(token, cache=cache, use_cache=True, **told).logits[:, -1:].argmax(-1)

    return write


def decoding_seconds(model: PreTrainedModel, ids: torch.Tensor, tokens: int, told: Mapping, device: str) -> float:
    """Seconds per token of `writing`."""
    return elapsed(writing(model, ids, tokens, told), device) / tokens


def generating(model: PreTrainedModel, ids: torch.Tensor, tokens: int, told: Mapping) -> None:
    """`generate` reads a prompt and writes exactly so many tokens."""
    model.eval()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **told)


def further_seconds(model: PreTrainedModel, ids: torch.Tensor, tokens: int, told: Mapping, device: str) -> float:
    """Seconds of a further token: `tokens` more in one call of `generate`, less a call that writes one alone."""
    one, more = (elapsed(partial(generating, model, ids, count, told), device) for count in (1, 1 + tokens))
    return (more - one) / tokens
