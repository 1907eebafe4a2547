"""n-gram models: probabilities, against a slow reading of the formula, and what they are refused."""

from collections import Counter

import numpy as np
import pytest
import torch

from ttt_e2e.evaluation.kneser_ney import KneserNey

VOCABULARY = 5


def text(count, seed=0):
    """Tokens that depend on the one before: there is something to count."""
    generator, tokens = np.random.default_rng(seed), [0]
    for _ in range(count - 1):
        tokens.append(int((tokens[-1] * 2 + generator.integers(2)) % VOCABULARY))
    return np.array(tokens)


def by_hand(tokens, history, word, order):
    """The formula read from its left to its right, with dictionaries."""
    tokens = [int(token) for token in tokens]

    def counts(size):
        runs = [tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1)]
        if size == order:
            return Counter(runs)
        different = set(runs)
        for length in range(order - 1, size - 1, -1):
            longer, different = different, {run[-length:] for run in different}
        return Counter(run[-size:] for run in longer)

    def probability(history, word):
        size = len(history) + 1
        found = counts(size)
        once, twice = (sum(value == times for value in found.values()) for times in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        following = {run: value for run, value in found.items() if run[:-1] == history}
        lower = probability(history[1:], word) if history else 1 / VOCABULARY
        if not following:
            return lower
        kept = max(found[(*history, word)] - discount, 0)
        return (kept + discount * len(following) * lower) / sum(following.values())

    return probability(tuple(history[-(order - 1) :]) if order > 1 else (), word)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_it_is_the_formula(order):
    training, row = text(200), text(30, seed=1)
    losses = KneserNey(training, VOCABULARY, order).token_losses(torch.from_numpy(row)[None])[0]
    for place in range(1, len(row)):
        expected = by_hand(training, [int(token) for token in row[:place]], int(row[place]), order)
        assert losses[place - 1].item() == pytest.approx(-np.log(expected), rel=1e-5)


@pytest.mark.parametrize("order", [1, 3])
def test_probabilities_sum_to_one(order):
    model = KneserNey(text(100), VOCABULARY, order)
    for history in ([0, 1, 2], [3, 3, 4], [4, 4, 4]):
        rows = torch.tensor([[*history, word] for word in range(VOCABULARY)])
        assert model.token_losses(rows)[:, -1].neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_more_context_helps_where_there_is_something_in_it():
    row = torch.from_numpy(text(2000, seed=2))[None]
    losses = [KneserNey(text(5000), VOCABULARY, order).token_losses(row).mean().item() for order in (1, 2)]
    assert losses[1] < losses[0] - 0.5


def test_rows_do_not_mix():
    model, rows = KneserNey(text(300), VOCABULARY, 3), torch.from_numpy(text(80, seed=3)).view(2, 40)
    assert torch.equal(model.token_losses(rows), torch.cat([model.token_losses(row[None]) for row in rows]))


def test_refusals():
    with pytest.raises(ValueError, match="order=5 with vocabulary_size=49152: a run does not fit into 62 bits"):
        KneserNey(text(100), 49152, 5)
    with pytest.raises(ValueError, match="order=3: the text has only 2 tokens"):
        KneserNey(text(2), VOCABULARY, 3)
