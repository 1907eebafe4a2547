"""What a cache holds: rows that are chosen and repeated, copies, sizes, and no gradient."""

import copy
import pickle

import pytest
import torch

from ttt_e2e import TTTE2ECache

from .helpers import BATCH, VOCAB, WINDOW, random_ids, small_model
from .reading_in_calls import CLOSE, assert_rows_equal, left_padded, read, state_of_row


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda blocks: f"{blocks}-suffix-blocks")
def model(request):
    return small_model(torch.float64, num_suffix_layers=request.param)


@pytest.fixture(scope="module")
def two_blocks():
    return small_model(torch.float64)


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


def test_a_pickled_cache_holds_no_more_than_it_shows(two_blocks):
    """Neither what a fork has read since, nor what happened to be in memory."""
    with torch.no_grad():
        cache = two_blocks(random_ids(1, 4 * WINDOW), use_cache=True).cache
        two_blocks(random_ids(1, 1, seed=1), cache=cache, use_cache=True)  # makes free places
        two_blocks(random_ids(1, 1, seed=2), cache=cache.fork(), use_cache=True)
    again = pickle.loads(pickle.dumps(cache))
    for own, other in zip(again.context.tensors(), cache.context.tensors(), strict=True):
        assert torch.equal(own, other) and own.untyped_storage().nbytes() == own.nbytes


@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])
def test_no_cached_tensor_keeps_a_long_text_alive(two_blocks, gradients):
    """The memory behind a tensor is about what it shows, also where it is the end of a long one."""
    with torch.set_grad_enabled(gradients):
        cache = two_blocks(random_ids(1, 32 * BATCH + 5), use_cache=True).cache
    context = cache.context
    tensors = [states for history in context.past_key_values for states in history.window]
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
