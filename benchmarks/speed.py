"""What learning while reading costs: training step, reading and decoding against the same model's plain pass.

Times are CPU seconds of one thread (seconds of the device on a GPU), the median over rounds in which all variants take
turns, so that a busy machine slows them alike.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from tqdm.auto import tqdm

from .. import TTTE2ECache, TTTE2EConfig, TTTE2EForCausalLM


@dataclass
class SpeedSizes:
    """Sizes of the measured model and of its input."""

    vocab_size: int = 512
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_suffix_layers: int = 2
    mini_batch_size: int = 64
    sliding_window: int = 256
    length: int = 1024
    batch_size: int = 2

    def build(self, device: str) -> TTTE2EForCausalLM:
        """A model of these sizes with random weights, float32."""
        torch.manual_seed(0)
        sizes = {name: value for name, value in vars(self).items() if name not in ("length", "batch_size")}
        special = {"bos_token_id": None, "eos_token_id": None}
        model = TTTE2EForCausalLM(TTTE2EConfig(**sizes, **special))
        return model.to(device)  # type: ignore[arg-type]  # a wrapped method

    def input_ids(self, device: str) -> torch.Tensor:
        """Random token ids [batch_size, length]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocab_size, (self.batch_size, self.length), generator=generator).to(device)


def measure_passes(sizes: SpeedSizes, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Seconds of a training step (forward and backward) and of reading, with and without learning.

    Returns:
        Median seconds by the name of the variant.
    """
    model, input_ids = sizes.build(device), sizes.input_ids(device)
    variants = {
        "training step, plain": partial(training_step, model, input_ids, learn=False, checkpoint=False),
        "training step, learning": partial(training_step, model, input_ids, learn=True, checkpoint=False),
        "training step, plain, checkpointing": partial(training_step, model, input_ids, learn=False, checkpoint=True),
        "training step, learning, checkpointing": partial(training_step, model, input_ids, learn=True, checkpoint=True),
        "reading, plain": partial(reading, model, input_ids, learn=False),
        "reading, learning": partial(reading, model, input_ids, learn=True),
    }
    return median_seconds(variants, rounds, device)


def measure_decoding(
    sizes: SpeedSizes, rounds: int, mini_batches: tuple[int, ...], device: str = "cpu"
) -> dict[str, float]:
    """Seconds per token of writing one mini-batch of tokens, its inner step included, after reading so many others.

    Returns:
        Median seconds per token by the name of the variant.
    """
    model = sizes.build(device).eval()
    read = {count: read_context(model, sizes, count, device) for count in mini_batches}
    variants = {
        f"decoding after {count} mini-batches": partial(decoding, model, cache, sizes.mini_batch_size)
        for count, cache in read.items()
    }
    seconds = median_seconds(variants, rounds, device)
    return {name: value / sizes.mini_batch_size for name, value in seconds.items()}


def median_seconds(variants: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median time of each variant over `rounds` rounds of all of them, after one round to warm up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {name: [] for name in variants}
    try:
        for round_number in tqdm(range(rounds + 1), desc="Measuring", unit=" rounds"):
            for name, run in variants.items():
                seconds = elapsed(run, device)
                if round_number > 0:
                    times[name].append(seconds)
    finally:
        torch.set_num_threads(threads)
    return {name: median(values) for name, values in times.items()}


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


def training_step(model: TTTE2EForCausalLM, input_ids: torch.Tensor, learn: bool, checkpoint: bool) -> None:
    """Forward and backward; the optimiser's step is the same for all and left out."""
    model.train()
    if checkpoint:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_disable()
    model.zero_grad()
    model(input_ids, labels=input_ids, use_cache=False, test_time_training=learn).loss.backward()


@torch.no_grad()
def reading(model: TTTE2EForCausalLM, input_ids: torch.Tensor, learn: bool) -> None:
    """Read a prompt as generation does: keep the cache, ask for the last logits only."""
    model.eval()
    model(input_ids, use_cache=True, logits_to_keep=1, test_time_training=learn)


@torch.no_grad()
def read_context(model: TTTE2EForCausalLM, sizes: SpeedSizes, mini_batches: int, device: str) -> TTTE2ECache:
    """A cache that has read so many mini-batches of random tokens, in one row."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(sizes.vocab_size, (1, mini_batches * sizes.mini_batch_size), generator=generator)
    cache = TTTE2ECache(model.config)
    model(input_ids.to(device), cache=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def decoding(model: TTTE2EForCausalLM, cache: TTTE2ECache, tokens: int) -> None:
    """Write tokens one by one, from a copy of the cache."""
    cache = cache.fork()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for _ in range(tokens):
        logits = model(token, cache=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
