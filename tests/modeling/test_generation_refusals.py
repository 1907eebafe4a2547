"""What generation cannot do is refused by name, before any work, and the cache stays as it was."""

import pytest
import torch
from transformers import (
    DynamicCache,
)

from .generating import generate
from .helpers import VOCAB, random_ids


def assert_refused(model, cache, error, match, ids=None, **arguments):
    """The call raises, and the cache is as it was."""
    before = None if cache is None else (cache.context, cache.columns, cache.finished)
    if cache is not None:
        arguments["cache"] = cache
    with pytest.raises(error, match=match):
        generate(model, random_ids(1, 20) if ids is None else ids, **arguments)
    if cache is not None:
        assert (cache.context, cache.columns, cache.finished) == before


@pytest.fixture
def cache(two_blocks):
    with torch.no_grad():
        return two_blocks(random_ids(1, 20)[:, :19], use_cache=True).cache


REFUSED = {
    "unknown-learn-from": (ValueError, r"`learn_from`.*'answer'", {"learn_from": "answer"}),
    "assistant": (ValueError, "`assistant_model", {"assistant_model": "itself"}),
    "prompt-lookup": (ValueError, "`prompt_lookup_num_tokens=3`", {"prompt_lookup_num_tokens": 3}),
    "early-exit": (ValueError, "`assistant_early_exit=2`", {"assistant_early_exit": 2}),
    "static": (ValueError, "`cache_implementation='static'`", {"cache_implementation": "static"}),
    "quantised": (ValueError, "`cache_implementation='quantized'`", {"cache_implementation": "quantized"}),
    "offloaded": (ValueError, "`cache_implementation='offloaded'`", {"cache_implementation": "offloaded"}),
    "continuous-batching": (ValueError, "`cache_implementation='paged'`", {"cache_implementation": "paged"}),
    "unknown-argument": (ValueError, "learn_form", {"learn_form": "prompt"}),
    "id-outside": (
        ValueError,
        f"`input_ids` holds the id {VOCAB}",
        {"ids": torch.tensor([[*random_ids(1, 20)[0], VOCAB]])},
    ),
}


IDS = random_ids(1, 20)
REFUSED |= {
    "learn-from-a-list": (ValueError, r"`learn_from`.*\['prompt'\]", {"learn_from": ["prompt"]}),
    "learn-from-nothing": (ValueError, r"`learn_from`.*None", {"learn_from": None}),
    "two-ways-to-learn": (
        ValueError,
        r"`learning_span=\(0, 3\)` and `learn_from='prompt'`",
        {"learning_span": (0, 3), "learn_from": "prompt"},
    ),
    "span-that-goes-back": (ValueError, r"`learning_span` is \(5, 2\)", {"learning_span": (5, 2)}),
    "negative-span": (ValueError, r"`learning_span` is \(-1, 2\)", {"learning_span": (-1, 2)}),
    "learning-as-text": (TypeError, "`test_time_training` must be .*'no'", {"test_time_training": "no"}),
    "use-cache-as-text": (TypeError, "`use_cache` must be .*'no'", {"use_cache": "no"}),
    "mask-as-list": (TypeError, "`attention_mask` must be a torch.Tensor", {"attention_mask": [[1] * 20]}),
    "mask-of-twos": (ValueError, "`attention_mask` holds 2", {"attention_mask": 2 * torch.ones(1, 20)}),
    "ids-as-list": (TypeError, "`input_ids` must be a torch.Tensor, got a list", {"ids": IDS.tolist()}),
    "ids-without-rows": (ValueError, r"`input_ids` must be .*\(20,\)", {"ids": IDS[0]}),
    "no-ids": (ValueError, r"`input_ids` must be .*\(1, 0\)", {"ids": IDS[:, :0]}),
    "ids-as-floats": (ValueError, r"`input_ids` must be integers.*float32", {"ids": IDS.float()}),
}


REFUSED_WITH_CACHE = {
    "cache-and-no-cache": (ValueError, "`use_cache=False`", {"use_cache": False}),
    "plain-model": (ValueError, "`test_time_training=False`", {"test_time_training": False}),
}
CASES = [pytest.param(case, False, id=name) for name, case in REFUSED.items()]
CASES += [pytest.param(case, True, id=f"{name}-cache") for name, case in (REFUSED | REFUSED_WITH_CACHE).items()]


@pytest.mark.parametrize("case, with_cache", CASES)
def test_what_is_impossible_is_refused_by_name(two_blocks, cache, case, with_cache):
    error, match, arguments = case
    arguments = {name: two_blocks if value == "itself" else value for name, value in arguments.items()}
    assert_refused(two_blocks, cache if with_cache else None, error, match, **arguments)


@pytest.mark.parametrize(
    "ids, mask",
    [
        (random_ids(1, 5, seed=1), None),
        (random_ids(1, 5, seed=1), torch.ones(1, 5)),
        (random_ids(1, 5, seed=1), torch.ones(1, 23)),
        (random_ids(1, 20)[:, :19], None),
        (random_ids(1, 25, seed=1), None),
    ],
    ids=["new-ids", "short-mask", "mask-of-another-length", "nothing-new", "another-text"],
)
def test_a_cache_needs_the_whole_sequence_or_a_full_mask(two_blocks, cache, ids, mask):
    match = r"`cache` has read 19 positions.*`input_ids` \(\d+ positions.*`attention_mask`"
    assert_refused(two_blocks, cache, ValueError, match, ids=ids, attention_mask=mask)


def test_a_foreign_cache_is_refused(two_blocks):
    foreign = DynamicCache(config=two_blocks.config)
    with pytest.raises(TypeError, match=r"`cache` is a DynamicCache.*TTTE2ECache"):
        generate(two_blocks, random_ids(1, 5), cache=foreign)
    assert foreign.get_seq_length() == 0
    with pytest.raises(TypeError, match="`cache` is a DynamicCache"):
        two_blocks(random_ids(1, 5), cache=foreign)


def test_a_cache_of_too_few_rows_is_refused(two_blocks, cache):
    match = "`cache` holds 1 rows but the inputs have 3.*batch_repeat_interleave"
    assert_refused(two_blocks, cache, ValueError, match, num_beams=3)


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "padding-id"])
def test_right_padding_is_refused(two_blocks, with_mask):
    ids = random_ids(2, 20)
    ids[0, 15:] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        generate(two_blocks, ids, attention_mask=(ids > 0).long() if with_mask else None)


def test_continuous_batching_is_refused(two_blocks):
    assert not hasattr(two_blocks, "init_continuous_batching")
    with pytest.raises(NotImplementedError, match="Continuous batching"):
        two_blocks.generate_batch([[3, 4, 5]])
