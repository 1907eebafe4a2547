"""What the tests of generation share: models that write many ids, ways of decoding, and comparisons."""

import torch
from transformers import (
    set_seed,
)

from .helpers import BATCH, random_ids, small_model

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64 under other orders of summation, amplified by a few inner steps
CLOSE_LOGITS = {"rtol": 1e-6, "atol": 1e-6}  # generate() returns float32
NEW = 2 * BATCH + 3
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam-sample": {"do_sample": True, "num_beams": 3},
    "several-samples": {"do_sample": True, "num_return_sequences": 2},
    "several-beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
}
# By the value of `learn_from`: whether the prompt is learned, and what is written.
LEARN = {"context": (True, True), "prompt": (True, False), "none": (False, False)}


def endless(blocks=2, **others):
    """A model that ends no sequence by itself; a head of its own and large weights make it write many different ids."""
    changes = {"eos_token_id": None, "tie_word_embeddings": False, "initializer_range": 0.3}
    return small_model(torch.float64, num_suffix_layers=blocks, **changes | others)


def generate(model, ids=None, **arguments):
    """Ids and everything else of a seeded generation."""
    set_seed(0)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    # The padding id is never written, or a row would end there.
    return model.generate(ids, suppress_tokens=[0], **(settings | arguments))


def left_padded(lengths=(5, 2 * BATCH, 3 * BATCH - 2)):
    """Ids, their mask, and the rows without padding."""
    rows = [random_ids(1, length, seed=length) for length in lengths]
    ids, mask = torch.zeros(len(rows), max(lengths), dtype=torch.long), torch.zeros(len(rows), max(lengths)).long()
    for index, row in enumerate(rows):
        ids[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row, 1
    return ids, mask, rows


def assert_contexts_equal(cache, other):
    """Same counters and same fast weights, row by row."""
    assert cache.context.tokens == other.context.tokens
    assert cache.context.pending_counts == other.context.pending_counts
    left, right = cache.context.fast.own_copies().tensors, other.context.fast.own_copies().tensors
    torch.testing.assert_close(left, right, **CLOSE)
