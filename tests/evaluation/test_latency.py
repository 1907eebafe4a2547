"""Latency counts the tokens that were read and written, and memory what is held."""

import pytest
import torch

from ttt_e2e.evaluation import Subject, latency
from ttt_e2e.evaluation.latency import peak_memory

from .subjects import BATCH, mistral, subject


class Clock:
    """Time passes only in the model's forward: 2 seconds to read the context, then a given time for each token."""

    def __init__(self, model, step_seconds):
        self.now, self.passes, self.steps = 0.0, 0, step_seconds
        model.model.register_forward_hook(self.advance)

    def advance(self, *_):
        index = self.passes % (1 + len(self.steps))
        self.now += 2.0 if index == 0 else self.steps[index - 1]
        self.passes += 1

    def __call__(self):
        return self.now


@pytest.mark.parametrize("kind", ["ours", "hybrid", "mistral"])
def test_time_is_divided_by_the_tokens_of_all_rows(kind):
    tested = subject(kind)
    clock = Clock(tested.model, step_seconds=[0.001, 0.002, 0.006])
    measured = latency(tested, length=50, new_tokens=3, rows=4, repeats=2, clock=clock)
    assert clock.passes == 3 * 4, "two repeats and one to warm up"
    assert measured["tokens"] == 200
    assert measured["prefill_seconds_per_1k_tokens"] == pytest.approx(2.0 / 0.2)
    assert measured["decode_milliseconds_per_token"] == pytest.approx(3.0)
    assert measured["decode_tokens_per_second"] == pytest.approx(4 / 0.003)


def test_padding_is_not_counted():
    tested, masks = subject("mistral"), []

    def keep_mask(_, __, arguments):
        if arguments["input_ids"].shape[1] > 1:
            masks.append(arguments["attention_mask"])

    tested.model.register_forward_pre_hook(keep_mask, with_kwargs=True)
    clock = Clock(tested.model, step_seconds=[0.001])
    measured = latency(tested, length=50, new_tokens=1, row_lengths=[50, 20, 10], repeats=1, clock=clock)
    assert measured["tokens"] == 80
    assert measured["prefill_seconds_per_1k_tokens"] == pytest.approx(2.0 / 0.080)
    assert masks[0].sum(dim=1).tolist() == [50, 20, 10] and (masks[0][:, -10:] == 1).all()


def test_the_median_of_the_repeats_counts():
    tested = subject("mistral")
    clock = Clock(tested.model, step_seconds=[0.001])
    slow = iter([0.0, 5.0, 0.0, 100.0])  # warm-up, then the repeats

    def read_slower(_, inputs, arguments):
        if arguments["input_ids"].shape[1] > 1:
            clock.now += next(slow)

    tested.model.model.register_forward_pre_hook(read_slower, with_kwargs=True)
    measured = latency(tested, length=10, new_tokens=1, repeats=3, clock=clock)
    assert measured["prefill_seconds_per_1k_tokens"] == pytest.approx(7.0 / 0.010)


def test_bytes_of_the_cache():
    """Two layers, keys and values, one head of 8 channels, float32; beside them a few counters."""
    token, counters = 2 * 2 * 8 * 4, 100
    measured = latency(subject("mistral"), length=30, new_tokens=2, rows=3, repeats=1)
    assert 0 <= measured["cache_bytes"] - 3 * 8 * token < counters, "a window of 8 tokens"
    full = latency(Subject("full", mistral(sliding_window=None)), length=30, new_tokens=2, repeats=1)
    assert 0 <= full["cache_bytes"] - (30 + 2) * token < counters, "the last token is written but not read"


def test_bytes_of_recurrent_states_and_learned_weights_do_not_grow():
    for kind in ("ours", "hybrid"):
        short, long = (latency(subject(kind), length, BATCH, repeats=1) for length in (32, 128))
        assert short["cache_bytes"] == long["cache_bytes"] > 0
    learned = latency(subject("ours"), 32, BATCH, repeats=1)["cache_bytes"]
    plain = latency(subject("ours", test_time_training=False), 32, BATCH, repeats=1)["cache_bytes"]
    # Two suffix blocks hold three matrices of 16 x 24 each, and what is not yet learned.
    assert learned - plain >= 2 * 3 * 16 * 24 * 4


def test_bytes_of_the_model():
    tested = subject("mistral")
    parameters = sum(parameter.numel() for parameter in tested.model.parameters())
    buffers = sum(buffer.numel() for buffer in tested.model.buffers())
    assert latency(tested, 5, 1, repeats=1)["model_bytes"] == 4 * (parameters + buffers)


def test_peak_memory_by_hand():
    with peak_memory(torch.device("cpu")) as peak:
        a = torch.zeros(10_000)
        b = a + 1
        del a
        c = torch.zeros(5_000)
    assert 0 <= peak[0] - 4 * 20_000 < 100
    del b, c


def test_peak_memory_grows_with_what_is_held():
    short, long = (latency(Subject("full", mistral(sliding_window=None)), n, 1, repeats=1) for n in (32, 256))
    assert long["peak_memory_bytes"] > 4 * short["peak_memory_bytes"] > 0


@pytest.mark.parametrize("wrong", [{"length": 0}, {"new_tokens": 0}, {"rows": 0}, {"repeats": 0}])
def test_numbers_that_are_not_positive_are_errors(wrong):
    right = {"length": 5, "new_tokens": 1}
    with pytest.raises(ValueError, match="=0: must be at least 1"):
        latency(subject("mistral"), **right | wrong)


@pytest.mark.parametrize("lengths", [[], [5, 0], [4, 3], [6, 5]])
def test_row_lengths_that_do_not_fit_are_errors(lengths):
    with pytest.raises(ValueError, match="row_lengths="):
        latency(subject("mistral"), length=5, new_tokens=1, row_lengths=lengths)
