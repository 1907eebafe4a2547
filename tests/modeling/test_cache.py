"""The cache: however a text is cut into calls and batches, the model reads, learns and predicts the same."""

import copy
import pickle

import pytest
import torch

from ttt_e2e import TTTE2ECache

from .by_hand import ReadingByHand
from .helpers import BATCH, VOCAB, WINDOW, random_ids, small_model

# In float64 other orders of summation differ by about 1e-15; thirteen inner steps amplify that a few thousand times.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
LENGTH = 13 * BATCH + 3


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda blocks: f"{blocks}-suffix-blocks")
def model(request):
    return small_model(torch.float64, num_suffix_layers=request.param)


@pytest.fixture(scope="module")
def two_blocks():
    return small_model(torch.float64)


def read(model, ids, sizes=None, cache=None, mask=None, **arguments):
    """Read `ids` in calls of `sizes` columns; returns logits, the cache, and each row's inner losses in order."""
    cache = TTTE2ECache(model.config) if cache is None else cache
    sizes = [ids.shape[1]] if sizes is None else sizes
    assert sum(sizes) == ids.shape[1]
    logits, inner, begin = [], [[] for _ in ids], 0
    for size in sizes:
        part = slice(begin, begin + size)
        own = None if mask is None else mask[:, part]
        with torch.no_grad():
            output = model(ids[:, part], attention_mask=own, cache=cache, **arguments)
        logits.append(output.logits)
        if output.inner_loss is not None:
            for losses, row in zip(inner, output.inner_loss.tolist(), strict=True):
                losses += [loss for loss in row if loss == loss]
        begin += size
    return torch.cat(logits, dim=1), cache, inner


def random_sizes(length, seed):
    """Call lengths that sum to `length`: mostly short ones, some of several mini-batches."""
    generator = torch.Generator().manual_seed(seed)
    sizes = []
    while sum(sizes) < length:
        longest = (3, BATCH + 1, 3 * BATCH)[int(torch.randint(3, (), generator=generator))]
        sizes.append(1 + int(torch.randint(longest, (), generator=generator)))
    sizes[-1] -= sum(sizes) - length
    return sizes


def state_of_row(cache, row):
    """Everything that one row has kept, without what pads it to the batch's shape, as a list of tensors."""
    context = cache.context
    tokens, window = context.tokens[row], WINDOW - 1
    state = [torch.tensor([tokens, context.next_positions[row]])]
    for history in context.histories:
        # How much older context stands beside depends on the other rows; the window is what any later token sees.
        state += [states[row, :, states.shape[2] - min(window, tokens) :] for states in history]
    if context.fast is not None:
        state += [tensor[row] for tensor in context.fast.own_copies().tensors]
    if context.pending is not None and context.pending.counts[row]:
        count, pending = context.pending.counts[row], context.pending
        state += [tensor[row, :count] for tensor in (pending.inputs, pending.ids, pending.positions)]
    return state


def assert_rows_equal(cache, row, other, other_row):
    torch.testing.assert_close(state_of_row(cache, row), state_of_row(other, other_row), **CLOSE)


def left_padded(rows):
    """Rows of different lengths as one batch, padded on the left; returns ids and mask."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :], mask[index, length - len(row) :] = row, 1
    return ids, mask


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


@pytest.mark.parametrize("use_prime_mlp", [True, False], ids=["prime", "ordinary"])
def test_reading_equals_the_inner_loop_by_hand(use_prime_mlp):
    model = small_model(torch.float64, use_prime_mlp=use_prime_mlp)
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


def ragged_cache(model, lengths=(6, 21, 13, 17)):
    """A cache of rows with different pending tokens, and the rows' ids."""
    ids, mask = left_padded([random_ids(1, length, seed=length)[0] for length in lengths])
    return read(model, ids, mask=mask)[1]


ROW_CHANGES = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0, 3])), [2, 2, 0, 3]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
    "select-bool": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, False, True])), [0, 3]),
}


@pytest.mark.parametrize("change, rows", ROW_CHANGES.values(), ids=ROW_CHANGES)
def test_changing_rows_moves_all_that_they_learned(model, change, rows):
    """Also through later steps: a row never sees what its copies or former neighbours read."""
    cache = ragged_cache(model)
    alone = []
    for row in rows:
        alone.append(cache.fork())
        alone[-1].batch_select_indices(torch.tensor([row]))
    change(cache)
    assert cache.batch_size == len(rows)
    new = random_ids(len(rows), 2 * BATCH + 1, seed=7)
    logits, cache, _ = read(model, new, [5, 1, 1, 2 * BATCH - 6], cache=cache)
    for index, own in enumerate(alone):
        own_logits, own, _ = read(model, new[index : index + 1], cache=own)
        torch.testing.assert_close(logits[index], own_logits[0], **CLOSE)
        assert_rows_equal(cache, index, own, 0)


def test_rows_share_fast_weights_until_they_differ(two_blocks):
    _, cache, _ = read(two_blocks, random_ids(1, 3 * BATCH, seed=1))
    original = [tensor.data_ptr() for tensor in cache.context.fast.tensors]
    bytes_of_weights = sum(tensor.nbytes for tensor in cache.context.fast.tensors)
    bytes_of_a_row = cache.nbytes - bytes_of_weights
    cache.batch_repeat_interleave(4)
    assert [tensor.data_ptr() for tensor in cache.context.fast.tensors] == original
    assert cache.nbytes == bytes_of_weights + 4 * bytes_of_a_row
    for step in range(3):  # the first token completes a mini-batch; three steps of beams
        _, cache, _ = read(two_blocks, random_ids(4, 1, seed=step), cache=cache)
        pointers = [tensor.data_ptr() for tensor in cache.context.fast.tensors]
        cache.reorder_cache(torch.tensor([1, 1, 0, 3]))
        assert [tensor.data_ptr() for tensor in cache.context.fast.tensors] == pointers


def test_fork_and_deepcopy_are_independent(two_blocks):
    ids, more, other = random_ids(1, 20), random_ids(1, 20, seed=1), random_ids(1, 30, seed=2)
    expected, _, _ = read(two_blocks, torch.cat([ids, more], dim=1))
    _, cache, _ = read(two_blocks, ids)
    copies = [cache.fork(), copy.deepcopy(cache), copy.copy(cache)]
    read(two_blocks, other, cache=copies[0])
    copies[1].reset()
    for own in (cache, copies[2]):
        logits, _, _ = read(two_blocks, more, cache=own)
        torch.testing.assert_close(logits, expected[:, 20:], **CLOSE)
    assert (copies[0].columns, copies[1].columns) == (50, 0)


def test_pickled_cache_reads_on_the_same(two_blocks):
    _, cache, _ = read(two_blocks, random_ids(2, 20))
    loaded = pickle.loads(pickle.dumps(cache))
    new = random_ids(2, 12, seed=1)
    assert torch.equal(read(two_blocks, new, cache=loaded)[0], read(two_blocks, new, cache=cache)[0])


def test_reset_forgets_everything(two_blocks):
    _, cache, _ = read(two_blocks, random_ids(2, 20))
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes, cache.has_learned) == (0, -1, 0, False)
    ids = random_ids(3, 20, seed=1)
    assert torch.equal(read(two_blocks, ids, cache=cache)[0], read(two_blocks, ids)[0])


def test_sizes_count_padded_columns(two_blocks):
    ids, mask = left_padded([random_ids(1, n, seed=n)[0] for n in (2, 19)])
    _, cache, _ = read(two_blocks, ids, mask=mask)
    assert cache.get_seq_length() == 19 and cache.context.tokens == (2, 19)
    assert cache.get_mask_sizes(3, 0) == (WINDOW - 1 + 3, 19 - (WINDOW - 1))
    assert cache.get_max_length() == -1 and not cache.is_compileable and not cache.is_croppable


def test_layers_show_keys_and_values(two_blocks):
    cache = TTTE2ECache(two_blocks.config)
    assert cache.layers == [] and not cache.is_initialized
    read(two_blocks, random_ids(2, 3 * BATCH + 5), cache=cache)
    assert len(cache.layers) == 4 and all(layer.is_sliding for layer in cache.layers)
    # The second suffix block also keeps the keys of the mini-batch that is not learned yet.
    columns = [WINDOW - 1, WINDOW - 1, WINDOW - 1, WINDOW - 1 + 5]
    assert [layer.keys.shape for layer in cache.layers] == [(2, 4, n, 8) for n in columns]
    assert [layer.values.shape for layer in cache.layers] == [(2, 4, n, 8) for n in columns]


def test_crop_removes_nothing(two_blocks):
    _, cache, _ = read(two_blocks, random_ids(1, 20))
    cache.crop(0)
    assert cache.columns == 20
    with pytest.raises(NotImplementedError, match=r"crop\(-1\).*fork"):
        cache.crop(-1)


@pytest.mark.parametrize("extra", [0, 5])
def test_size_does_not_depend_on_how_much_was_read(extra):
    """Bytes after 8, 32 and 128 mini-batches, read at once or in calls."""
    model = small_model()
    sizes = set()
    for mini_batches in (8, 32, 128):
        length = mini_batches * BATCH + extra
        for calls in ([length], [50] * (length // 50) + [length % 50]):
            _, cache, _ = read(model, random_ids(1, length), calls)
            sizes.add(cache.nbytes)
    assert len(sizes) == 1


@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])
def test_no_cached_tensor_keeps_a_long_text_alive(two_blocks, gradients):
    """The memory behind a tensor is about what it shows, also where it is the end of a long one."""
    with torch.set_grad_enabled(gradients):
        cache = two_blocks(random_ids(1, 32 * BATCH + 5), use_cache=True).cache
    context = cache.context
    tensors = [states for history in context.histories for states in history]
    tensors += [*context.fast.tensors, context.pending.inputs, context.pending.ids, context.pending.positions]
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() <= 1.5 * tensor.nbytes + 1024


@pytest.mark.parametrize("training", [False, True])
def test_reading_with_gradients_leaves_a_detached_cache(two_blocks, training):
    """A call differentiates through itself, not through what was read before; values are those without gradients."""
    model = copy.deepcopy(two_blocks).train(training)
    ids, new = random_ids(2, 20), random_ids(2, 21, seed=1)
    _, cache, _ = read(two_blocks, ids)
    expected_cache = cache.fork()
    expected, _, _ = read(two_blocks, new, cache=expected_cache)
    output = model(new, labels=new, cache=cache)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    for row in range(2):
        assert not any(tensor.requires_grad for tensor in state_of_row(cache, row))
        assert_rows_equal(cache, row, expected_cache, row)
    assert not output.inner_loss.requires_grad and not output.inner_grad_norm.requires_grad


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


def test_bfloat16_contexts_keep_fast_weights_in_float32():
    model = small_model(torch.bfloat16)
    _, cache, _ = read(model, random_ids(2, 30), [13, 17])
    assert {tensor.dtype for tensor in cache.context.fast.tensors} == {torch.float32}
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_moving_a_cache_keeps_its_content(two_blocks):
    _, cache, _ = read(two_blocks, random_ids(2, 20))
    moved = cache.fork().to("cpu")
    new = random_ids(2, 9, seed=1)
    assert torch.equal(read(two_blocks, new, cache=moved)[0], read(two_blocks, new, cache=cache)[0])
    assert cache.fork().to("meta").layers[0].keys.is_meta


def test_a_cache_of_another_shape_is_refused(two_blocks):
    _, cache, _ = read(two_blocks, random_ids(2, 20))
    before = cache.context
    with pytest.raises(ValueError, match=r"cache. holds 2 rows but the inputs have 3"):
        two_blocks(random_ids(3, 2), cache=cache)
    with pytest.raises(ValueError, match="another configuration"):
        small_model(torch.float64, num_suffix_layers=1)(random_ids(2, 2), cache=cache)
    with pytest.raises(ValueError, match=f"{VOCAB}"):
        two_blocks(torch.full((2, 2), VOCAB), cache=cache)
    assert cache.context is before and cache.columns == 20
