"""Sequences that were read apart go on as rows of one batch, and come apart again, as if each were alone."""

import pytest
import torch

from ttt_e2e import TTTE2ECache

from .helpers import BATCH, WINDOW, random_ids, small_model
from .reading_in_calls import CLOSE, assert_rows_equal, read

READ = (1, 5, 2 * BATCH, 3 * BATCH - 1, WINDOW + 5 * BATCH + 3)
MODELS = {
    "plain": {},
    "sinks": {"num_sink_tokens": 3},
    "hybrid": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_sink_tokens": 3,
    },
    "no-attention": {"use_attention": False},
    "all-blocks": {"num_suffix_layers": 4, "use_prime_mlp": False},
    "no-learning": {"test_time_training": False},
}


def read_apart(model, lengths=READ):
    ids = [random_ids(1, length, seed=length) for length in lengths]
    return [read(model, own)[1] for own in ids]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("sizes", [[1] * (2 * BATCH + 1), [3, BATCH, 1, 2 * BATCH + 2]], ids=["tokens", "chunks"])
def test_rows_that_join_read_on_as_each_alone(changes, sizes):
    model = small_model(torch.float64, **changes)
    caches = read_apart(model)
    joined = TTTE2ECache.joined(caches)
    ids = random_ids(len(READ), sum(sizes), seed=77)
    begin = 0
    for size in sizes:
        new = ids[:, begin : begin + size]
        with torch.no_grad():
            together = model(new, cache=joined, use_cache=True).logits
            for row, cache in enumerate(caches):
                alone = model(new[row : row + 1], cache=cache, use_cache=True).logits
                torch.testing.assert_close(together[row], alone[0], **CLOSE)
        begin += size
    for row, cache in enumerate(caches):
        assert_rows_equal(joined, row, cache, 0)


def test_joining_changes_none_of_them():
    model = small_model(torch.float64)
    caches = read_apart(model)
    joined = TTTE2ECache.joined([caches[3], caches[0]])
    with torch.no_grad():
        model(random_ids(2, 3 * BATCH), cache=joined)
    for cache, again in zip(caches, read_apart(model), strict=True):
        assert_rows_equal(cache, 0, again, 0)


def test_rows_leave_and_join_at_any_step():
    """Six sequences of different lengths, two or three of them at a time in the batch."""
    model = small_model(torch.float64)
    ids = [random_ids(1, 4 * BATCH + 3, seed=seed)[0] for seed in range(6)]
    alone = [read(model, own[None])[1] for own in ids]
    inside, done, cache, waiting = [], {}, None, list(range(6))
    while waiting or inside:
        if (waiting and len(inside) < 3 and len(waiting) % 2 == 0) or not inside:
            number = waiting.pop()
            entering = read(model, ids[number][None, : 2 * number + 1])[1]
            cache = TTTE2ECache.joined([entering] if cache is None else [cache, entering])
            inside.append([number, 2 * number + 1])
        with torch.no_grad():
            model(torch.stack([ids[number][place] for number, place in inside])[:, None], cache=cache)
        inside = [[number, place + 1] for number, place in inside]
        if waiting and len(waiting) % 2 == 1:
            number = waiting.pop()
            entering = read(model, ids[number][None, : 2 * number + 1])[1]
            cache = TTTE2ECache.joined([cache, entering])
            inside.append([number, 2 * number + 1])
        for row in reversed(range(len(inside))):
            number, place = inside[row]
            if place == len(ids[number]):
                done[number] = cache.fork()
                done[number].batch_select_indices(torch.tensor([row]))
                del inside[row]
                kept = [other for other in range(cache.batch_size) if other != row]
                cache.batch_select_indices(torch.tensor(kept)) if kept else None
        cache = cache if inside else None
    assert sorted(done) == list(range(6))
    for number, own in enumerate(alone):
        assert_rows_equal(done[number], 0, own, 0)


def test_what_cannot_be_joined_is_refused():
    model = small_model()
    cache = read_apart(model, (5,))[0]
    with pytest.raises(ValueError, match="number 1 of 2 has read nothing"):
        TTTE2ECache.joined([cache, TTTE2ECache(model.config)])
    with pytest.raises(ValueError, match="is empty"):
        TTTE2ECache.joined([])
    finished = cache.fork()
    finished.finished = (True,)
    with pytest.raises(ValueError, match="number 0 of 1 has finished rows"):
        TTTE2ECache.joined([finished])
