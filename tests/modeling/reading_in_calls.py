"""A text read in calls of any lengths, and what each row of the cache then holds."""

import torch

from ttt_e2e import TTTE2ECache

from .helpers import BATCH, WINDOW

# In float64 other orders of summation differ by about 1e-15; thirteen inner steps amplify that a few thousand times.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
LENGTH = 13 * BATCH + 3


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
    for history in context.past_key_values:
        # How much older context stands beside depends on the other rows; the window is what any later token sees.
        state += [states[row, :, states.shape[2] - min(window, tokens) :] for states in history.window]
        state += [states[row, :, :tokens] for states in history.sinks or ()]
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
