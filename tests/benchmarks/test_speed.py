"""The benchmark runs every variant; its numbers are not judged here."""

import pytest
import torch

from ttt_e2e.benchmarks import SpeedSizes, measure_decoding, measure_passes
from ttt_e2e.benchmarks.memory import peak_growth

SMALL = SpeedSizes(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_suffix_layers=1,
    mini_batch_size=4,
    sliding_window=8,
    length=16,
    batch_size=2,
)


def test_all_variants_are_timed_and_threads_restored():
    threads = torch.get_num_threads()
    passes = measure_passes(SMALL, rounds=2)
    decoding = measure_decoding(SMALL, rounds=1, mini_batches=(1, 3))
    assert len(passes) == 6 and list(decoding) == ["decoding after 1 mini-batches", "decoding after 3 mini-batches"]
    assert all(seconds > 0 for seconds in [*passes.values(), *decoding.values()])
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("work", ["train", "read"])
def test_peak_never_shrinks(work):
    threads = torch.get_num_threads()
    try:
        assert peak_growth(SMALL, work, learn=True, checkpoint=False, device="cpu") >= 0
    finally:
        torch.set_num_threads(threads)
