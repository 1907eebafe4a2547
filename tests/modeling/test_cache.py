"""The cache: however a text is cut into calls and batches, the model reads, learns and predicts the same."""

import pytest
import torch

from ttt_e2e import TTTE2ECache

from .by_hand import ReadingByHand
from .helpers import BATCH, random_ids, small_model
from .reading_in_calls import CLOSE, LENGTH, assert_rows_equal, left_padded, random_sizes, read, state_of_row


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda blocks: f"{blocks}-suffix-blocks")
def model(request):
    return small_model(torch.float64, num_suffix_layers=request.param)


@pytest.fixture(scope="module")
def two_blocks():
    return small_model(torch.float64)


@pytest.mark.parametrize(
    "sizes",
    [
        [1] * LENGTH,
        [BATCH] * 13 + [3],
        [BATCH - 1] + [BATCH] * 12 + [4],
        [BATCH + 1] * 11 + [LENGTH - 11 * (BATCH + 1)],
        [3 * BATCH, 1, 1, LENGTH - 3 * BATCH - 2],
        *(random_sizes(LENGTH, seed) for seed in range(4)),
    ],
    ids=["token-by-token", "mini-batches", "one-less", "one-more", "mixed", "random0", "random1", "random2", "random3"],
)
def test_any_split_into_calls_equals_one_pass(model, sizes):
    ids = random_ids(2, LENGTH, seed=1)
    ids[0, [BATCH, 3 * BATCH - 1, 30]] = model.config.bos_token_id
    logits, cache, inner = read(model, ids)
    split_logits, split_cache, split_inner = read(model, ids, sizes)
    torch.testing.assert_close(split_logits, logits, **CLOSE)
    for row in range(2):
        assert_rows_equal(split_cache, row, cache, row)
        assert len(inner[row]) == (LENGTH - 1) // BATCH
        assert split_inner[row] == pytest.approx(inner[row], rel=1e-9)
    assert [layer.keys.shape for layer in split_cache.layers] == [layer.keys.shape for layer in cache.layers]


@pytest.mark.parametrize(
    "changes", [{}, {"use_prime_mlp": False}, {"inner_projections": "down"}], ids=["prime", "ordinary", "down"]
)
def test_reading_equals_the_inner_loop_by_hand(changes):
    model = small_model(torch.float64, **changes)
    ids = random_ids(1, 5 * BATCH + 2, seed=2)
    ids[0, [BATCH, 20]] = model.config.bos_token_id
    logits, cache, _ = read(model, ids)
    by_hand = ReadingByHand(model)
    expected = torch.stack([by_hand.read(token) for token in ids[0].tolist()])
    torch.testing.assert_close(logits[0], expected, **CLOSE)
    assert by_hand.steps == 5
    torch.testing.assert_close([t[0] for t in cache.context.fast.tensors], by_hand.fast_weights, **CLOSE)


@pytest.mark.parametrize("length", [1, BATCH, BATCH + 1, 3 * BATCH, LENGTH])
def test_cache_equals_no_cache(model, length):
    ids = random_ids(2, length, seed=3)
    logits, _, _ = read(model, ids, [1] * length)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
    assert whole.cache is None
    torch.testing.assert_close(logits, whole.logits, **CLOSE)


def test_ragged_rows_equal_the_rows_alone_through_many_steps(model):
    """Rows of different lengths reach the ends of their mini-batches at different steps."""
    lengths, steps = (5, 2 * BATCH, 3 * BATCH - 1, 1), 3 * BATCH
    rows = [random_ids(1, length + steps, seed=length)[0] for length in lengths]
    ids, mask = left_padded([row[:length] for row, length in zip(rows, lengths, strict=True)])
    logits, cache, inner = read(model, ids, mask=mask)
    news = torch.stack([row[length:] for row, length in zip(rows, lengths, strict=True)])
    for step in range(steps):
        more, cache, losses = read(model, news[:, step : step + 1], cache=cache)
        logits = torch.cat([logits, more], dim=1)
        inner = [old + new for old, new in zip(inner, losses, strict=True)]
    for index, row in enumerate(rows):
        own_logits, own_cache, own_inner = read(model, row[None])
        torch.testing.assert_close(logits[index, -len(row) :], own_logits[0], **CLOSE)
        assert inner[index] == pytest.approx(own_inner[0], rel=1e-9)
        assert_rows_equal(cache, index, own_cache, 0)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 7, 7, 7, 12], [30, 10], [3, 37]], ids=str)
def test_padding_anywhere_changes_nothing(model, sizes):
    """Left, right, middle and scattered padding; some calls bring a row, or every row, nothing but padding."""
    length = sum(sizes)
    mask = torch.ones(5, length, dtype=torch.long)
    mask[0, :11], mask[1, 25:], mask[2, 10:29] = 0, 0, 0
    mask[3] = torch.rand(length, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 7:14] = 0
    ids = random_ids(5, length, seed=4)
    logits, cache, inner = read(model, ids, sizes, mask=mask)
    for row in range(5):
        real = mask[row].bool()
        own_logits, own_cache, own_inner = read(model, ids[row : row + 1, real])
        torch.testing.assert_close(logits[row, real], own_logits[0], **CLOSE)
        assert inner[row] == pytest.approx(own_inner[0], rel=1e-9)
        assert_rows_equal(cache, row, own_cache, 0)
    assert cache.get_seq_length() == length


def test_a_mask_over_all_columns_reads_as_one_over_the_new_ones(two_blocks):
    ids, mask = left_padded([random_ids(1, n, seed=n)[0] for n in (7, 19)])
    _, cache, _ = read(two_blocks, ids, mask=mask)
    other = cache.fork()
    new = random_ids(2, 5, seed=9)
    logits, _, _ = read(two_blocks, new, cache=cache)
    with torch.no_grad():
        full = two_blocks(new, attention_mask=torch.cat([mask, torch.ones_like(new)], 1), cache=other)
    assert torch.equal(full.logits, logits)


def test_position_ids_continue_across_calls(two_blocks):
    ids = random_ids(1, 30, seed=5)
    positions = torch.arange(30)[None]
    logits, _, _ = read(two_blocks, ids)
    cache, parts = TTTE2ECache(two_blocks.config), []
    for part in (slice(0, 11), slice(11, 30)):
        with torch.no_grad():
            parts.append(two_blocks(ids[:, part], position_ids=positions[:, part], cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, **CLOSE)
    before = cache.fork()
    with pytest.raises(ValueError, match="position_ids"):
        two_blocks(ids[:, :3], position_ids=positions[:, :3], cache=cache)
    assert cache.columns == 30 and cache.context is before.context


def test_forward_without_use_cache_reads_a_cache_and_leaves_it(two_blocks):
    ids = random_ids(2, 2 * BATCH + 3)
    logits, _, _ = read(two_blocks, ids)
    _, cache, _ = read(two_blocks, ids[:, :11])
    before = cache.context
    with torch.no_grad():
        output = two_blocks(ids[:, 11:], cache=cache, use_cache=False)
    torch.testing.assert_close(output.logits, logits[:, 11:], **CLOSE)
    assert output.cache is None and cache.context is before and cache.columns == 11


def test_the_plain_model_refuses_a_learned_context(two_blocks):
    _, cache, _ = read(two_blocks, random_ids(1, BATCH + 1))
    before = cache.context
    with pytest.raises(ValueError, match=r"test_time_training=False.*learn_from"):
        two_blocks(random_ids(1, 3), cache=cache, test_time_training=False)
    assert cache.context is before and cache.columns == BATCH + 1


def test_switching_learning_on_starts_a_new_mini_batch(two_blocks):
    """Tokens read with learning off are never learned, nor is the mini-batch that they interrupt."""
    ids = random_ids(1, 60, seed=6)
    on, off = {"learning_span": None}, {"learning_span": (0, 0)}
    cache, logits, by_hand, expected = TTTE2ECache(two_blocks.config), [], ReadingByHand(two_blocks), []
    begin = 0
    for size, arguments in ((BATCH + 4, on), (3, off), (BATCH, on), (2, off), (5, on), (BATCH, on), (1, off), (21, on)):
        part = ids[:, begin : begin + size]
        logits.append(read(two_blocks, part, cache=cache, **arguments)[0][0])
        expected += [by_hand.read(token, arguments is on) for token in part[0].tolist()]
        begin += size
    torch.testing.assert_close(torch.cat(logits), torch.stack(expected), **CLOSE)
    assert by_hand.steps == 1 + 0 + 1 + 2
    torch.testing.assert_close([t[0] for t in cache.context.fast.tensors], by_hand.fast_weights, **CLOSE)


def test_the_plain_model_and_then_learning(two_blocks):
    """A context that was read without learning may learn from here on."""
    ids = random_ids(1, 40, seed=8)
    cache, by_hand = TTTE2ECache(two_blocks.config), ReadingByHand(two_blocks)
    plain, _, _ = read(two_blocks, ids[:, :13], cache=cache, test_time_training=False)
    learned, _, _ = read(two_blocks, ids[:, 13:], cache=cache)
    expected = [by_hand.read(token, learning=place >= 13) for place, token in enumerate(ids[0].tolist())]
    torch.testing.assert_close(torch.cat([plain, learned], dim=1)[0], torch.stack(expected), **CLOSE)
    assert by_hand.steps == (40 - 13 - 1) // BATCH


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [9, 20, 21]], ids=str)
@pytest.mark.parametrize("span", [(0, 50), (0, 2 * BATCH), (0, 2 * BATCH + 1), (5, 37), (9, 29), (13, 13), (30, 99)])
def test_only_the_learning_span_is_learned(two_blocks, span, sizes):
    """A step needs all of its tokens and all of its targets inside the span."""
    ids = random_ids(1, 50, seed=9)
    logits, cache, inner = read(two_blocks, ids, sizes, learning_span=span)
    by_hand = ReadingByHand(two_blocks)
    inside = [span[0] <= column < span[1] for column in range(50)]
    expected = [by_hand.read(token, learning) for token, learning in zip(ids[0].tolist(), inside, strict=True)]
    torch.testing.assert_close(logits[0], torch.stack(expected), **CLOSE)
    assert by_hand.steps == len(inner[0]) == max(0, (sum(inside) - 1) // BATCH)
    assert cache.has_learned == (by_hand.steps > 0)


def test_a_learning_span_counts_padded_columns(two_blocks):
    rows = [random_ids(1, n, seed=n)[0] for n in (30, 41)]
    ids, mask = left_padded(rows)
    logits, _, _ = read(two_blocks, ids, [20, 21], mask=mask, learning_span=(0, 35))
    for index, row in enumerate(rows):
        own, _, _ = read(two_blocks, row[None], learning_span=(0, len(row) - 6))
        torch.testing.assert_close(logits[index, -len(row) :], own[0], **CLOSE)


def test_hybrid_attention_reads_the_same_in_any_split():
    model = small_model(torch.float64, layer_types=["full_attention", "sliding_attention"] * 2)
    ids, mask = left_padded([random_ids(1, n, seed=n)[0] for n in (29, 43)])
    logits, cache, _ = read(model, ids, mask=mask)
    split, split_cache, _ = read(model, ids, [13] + [1] * 17 + [13], mask=mask)
    torch.testing.assert_close(split[mask.bool()], logits[mask.bool()], **CLOSE)
    assert [layer.is_sliding for layer in cache.layers] == [False, True] * 2
    torch.testing.assert_close(
        [t for row in range(2) for t in state_of_row(split_cache, row)],
        [t for row in range(2) for t in state_of_row(cache, row)],
        **CLOSE,
    )


def test_full_attention_suffix_reads_the_same_in_any_split():
    model = small_model(torch.float64, layer_types=["sliding_attention", "full_attention"] * 2)
    ids = random_ids(2, 43)
    logits, _, _ = read(model, ids)
    split, _, _ = read(model, ids, [13] + [1] * 17 + [13])
    torch.testing.assert_close(split, logits, **CLOSE)
