"""A row's outer gradient does not depend on its neighbours: that of a batch is the sum over its rows alone, exactly.

Rows begin and end anywhere within a mini-batch, go on from a cache that was read in pieces, and are padded anywhere.
"""

import random

import pytest
import torch

from ttt_e2e import TTTE2ECache

from .helpers import BATCH, distance, gradients, random_ids, small_model

MODES = {
    "one suffix block": {"num_suffix_layers": 1},
    "two suffix blocks": {"num_suffix_layers": 2},
    "three suffix blocks": {"num_suffix_layers": 3},
    "first order": {"meta_gradient": "first_order"},
    "cut at every step": {"meta_gradient_horizon": 1},
    "cut at every second step": {"meta_gradient_horizon": 2, "num_suffix_layers": 3},
    "full attention": {"layer_types": ["full_attention"] * 4, "meta_gradient_horizon": 3},
    "ordinary MLPs learn": {"use_prime_mlp": False},
    "sinks": {"num_sink_tokens": 3, "num_suffix_layers": 3},
}


def padded(rows: list[torch.Tensor], chance: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as one batch with padding at random places, and its mask."""
    columns = max(map(len, rows)) + chance.randrange(3)
    ids, mask = random_ids(len(rows), columns, seed=99), torch.zeros(len(rows), columns, dtype=torch.long)
    for row, own in enumerate(rows):
        places = torch.tensor(sorted(chance.sample(range(columns), len(own))), dtype=torch.long)
        ids[row, places], mask[row, places] = own, 1
    return ids, mask


def read_before(model, rows: list[torch.Tensor], chance: random.Random) -> TTTE2ECache:
    """What the rows have learned from earlier calls, of random length each."""
    cache = TTTE2ECache(model.config)
    read = [0] * len(rows)
    while min(read) == 0 or any(done < len(row) for done, row in zip(read, rows, strict=True)):
        ends = [min(len(row), done + chance.randint(1, BATCH + 3)) for done, row in zip(read, rows, strict=True)]
        parts = [row[done:end] for row, done, end in zip(rows, read, ends, strict=True)]
        ids, mask = padded(parts, chance)
        with torch.no_grad():
            model(ids, attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1)
        read = ends
    return cache


def following(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The next token of each row's tokens, wherever it stands; -100 at padding and behind the last token."""
    labels = torch.full_like(ids, -100)
    for row, real in enumerate(mask.bool()):
        places = real.nonzero().squeeze(1)
        labels[row, places[:-1]] = ids[row, places[1:]]
    return labels


def outer_gradients(model, ids, mask, cache, weights):
    """Gradients of the weighted sum of all token losses."""
    model.zero_grad()
    arguments = {} if cache is None else {"cache": cache.fork(), "use_cache": False}
    output = model(ids, attention_mask=mask, shift_labels=following(ids, mask), **arguments)
    # Each row's own weight, so that a gradient that wandered into another row would show.
    (output.token_nll * weights[:, None]).sum().backward()
    return gradients(model)


@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointing"]
)
@pytest.mark.parametrize("mode", MODES)
def test_the_outer_gradient_of_a_batch_is_the_sum_over_its_rows(mode, checkpointing):
    model = small_model(torch.float64, **MODES[mode])
    if checkpointing:
        model.train().activation_checkpointing_enable()
    chance = random.Random(f"{mode} {checkpointing}")
    for trial in range(4):
        count = chance.randint(2, 4)
        before = [chance.choice([BATCH, 2 * BATCH, chance.randint(1, 20)]) for _ in range(count)]
        before = [random_ids(1, length, seed=row)[0] for row, length in enumerate(before)]
        new = [chance.randint(2, 28), *(chance.choice([1, BATCH, chance.randint(2, 28)]) for _ in range(count - 1))]
        new = [random_ids(1, length, seed=10 + row)[0] for row, length in enumerate(new)]
        cache = None if trial == 3 else read_before(model, before, chance)
        weights = torch.tensor([chance.uniform(0.5, 2.0) for _ in new], dtype=torch.float64)
        together = outer_gradients(model, *padded(new, chance), cache, weights)
        alone = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
        for row, ids in enumerate(new):
            own = None
            if cache is not None:
                own = cache.fork()
                own.batch_select_indices(torch.tensor([row]))
            for name, gradient in outer_gradients(
                model, ids[None], torch.ones_like(ids[None]), own, weights[row : row + 1]
            ).items():
                alone[name] += gradient
        lengths = [(len(old), len(fresh)) for old, fresh in zip(before, new, strict=True)]
        assert distance(together, alone) < 1e-9, f"rows of {lengths} tokens before and in the call"
