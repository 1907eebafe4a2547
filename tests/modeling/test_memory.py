"""Memory: reading needs the same for any length, and training keeps only what the outer gradient needs.

Bytes are those that torch's allocator hands out, in order, so that the numbers are exact and the same in every run.
"""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .helpers import BATCH, VOCAB, WINDOW, random_ids, small_model

ROWS, HEADS, HIDDEN = 2, 4, 32  # of the small model; a hidden state takes 128 bytes per token
SEGMENT = WINDOW  # what is read at once: whole mini-batches, about a window


def allocations(call: Callable) -> tuple[int, int, object]:
    """Peak of the bytes that a call allocates, the bytes still held at its end, and what it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0
    return peak, now, result


class Sizes(TorchDispatchMode):
    """Shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result

    @property
    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def most_logits(self) -> int:
        """The largest number of tokens for which a value per vocabulary entry existed; weights are no tokens."""
        tokens = {torch.Size(shape).numel() // VOCAB for shape in self.shapes if VOCAB in shape}
        return max(tokens - {HIDDEN})


def no_padding(ids):
    return None


def ragged(ids):
    """The first row's first half is padding, and something in the middle of the second."""
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 2], mask[1, 20:30] = 0, 0
    return mask


@pytest.mark.parametrize("padding", [no_padding, ragged], ids=["no-padding", "padded"])
@pytest.mark.parametrize("learn", [True, False], ids=["learning", "plain"])
def test_reading_makes_no_tensor_of_the_length_of_the_text(learn, padding):
    """No mask, score or hidden state is larger than segment x (window + segment), for every head."""
    model = small_model()
    ids = random_ids(ROWS, 64 * BATCH)
    with torch.no_grad(), Sizes() as sizes:
        model(ids, padding(ids), logits_to_keep=1, use_cache=True, test_time_training=learn)
    assert sizes.largest <= ROWS * HEADS * SEGMENT * (WINDOW + SEGMENT)
    assert sizes.most_logits <= ROWS * BATCH


@pytest.mark.parametrize("padding", [no_padding, ragged], ids=["no-padding", "padded"])
@pytest.mark.parametrize("learn", [True, False], ids=["learning", "plain"])
def test_peak_of_reading_does_not_grow_with_the_text(learn, padding):
    """What grows are ids and places, less than half a hidden state per token."""
    model = small_model()

    def peak(length):
        ids = random_ids(ROWS, length)
        mask = padding(ids)

        def read():
            with torch.no_grad():
                return model(ids, mask, logits_to_keep=1, use_cache=True, test_time_training=learn)

        read()  # what the first call of an operation leaves behind is not counted
        return allocations(read)[0]

    short, long = 16 * BATCH, 48 * BATCH
    assert peak(long) - peak(short) < 64 * ROWS * (long - short)


def test_peak_of_generation_does_not_grow_with_the_prompt():
    model = small_model()

    def peak(length):
        ids = random_ids(ROWS, length)
        return allocations(lambda: model.generate(ids, max_new_tokens=3, do_sample=False))[0]

    peak(BATCH)
    short, long = 16 * BATCH, 48 * BATCH
    assert peak(long) - peak(short) < 64 * ROWS * (long - short)


@pytest.mark.parametrize("labels_are_ids", [True, False], ids=["next-ids", "other-labels"])
@pytest.mark.parametrize("learn", [True, False], ids=["learning", "plain"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["no-grad", "checkpointing"])
def test_skipped_logits_exist_for_one_mini_batch_at_most(checkpointing, learn, labels_are_ids):
    model = small_model()
    ids = random_ids(ROWS, 6 * BATCH + 3)
    labels = ids if labels_are_ids else random_ids(ROWS, 6 * BATCH + 3, seed=1)
    if checkpointing:
        model.train().activation_checkpointing_enable()
    with torch.set_grad_enabled(checkpointing), Sizes() as sizes:
        output = model(ids, labels=labels, skip_logits=True, test_time_training=learn)
        if checkpointing:
            output.loss.backward()
    assert output.logits is None
    assert sizes.most_logits == ROWS * BATCH


def saved(length: int, every: int) -> int:
    """Bytes that training with gradient checkpointing holds between the forward and the backward pass of one row."""
    model = small_model(inner_checkpoint_every=every).train()
    model.activation_checkpointing_enable()
    ids = random_ids(1, length)

    def forward():
        return model(ids, labels=ids, skip_logits=True).loss

    forward()
    return allocations(forward)[1]


# One row's state at a border: two blocks' three fast weights, and the second block's window of keys and values.
FAST_WEIGHTS = 2 * 3 * 48 * HIDDEN * 4
WINDOW_OF_KEYS = 2 * 2 * BATCH * HIDDEN * 4
# A group also keeps the state of the random number generator (5056 bytes) and its own outputs' bookkeeping.
GROUP = FAST_WEIGHTS + WINDOW_OF_KEYS + 8 * 1024


@pytest.mark.parametrize("every", [2, 4, 8])
def test_checkpointing_stores_one_state_per_group(every):
    """Of two groupings of the same text, the finer one stores just the states of its additional groups."""
    mini_batches = 32
    additional = mini_batches // every - mini_batches // (2 * every)
    difference = saved(mini_batches * BATCH, every) - saved(mini_batches * BATCH, 2 * every)
    assert FAST_WEIGHTS * additional <= difference <= GROUP * additional


def test_checkpointing_grows_by_prefix_activations_and_boundary_states():
    """Per token: the inputs of the prefix's blocks, and what enters the inner loop; no activation of an inner step."""
    every, short, long = 8, 16 * BATCH, 48 * BATCH
    growth = saved(long, every) - saved(short, every)
    groups = (long - short) // BATCH // every
    # The inputs of two prefix blocks, of the first suffix block's attention and of the inner loop; angles, ids,
    # targets and losses take less than two more hidden states. One inner step's activations would be about 300.
    per_token = (4 + 2) * HIDDEN * 4
    assert growth <= groups * GROUP + per_token * (long - short)
