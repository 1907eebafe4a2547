"""Interpolated Kneser-Ney n-gram models of token ids: what counting alone makes of a text (Chen & Goodman 1999).

With counts c of runs in the training text, D_k the discount of order k and N(. h w) the number of different tokens seen
before the run h w, the model of order n is

    p_n(w | h) = max(c(h w) - D_n, 0) / c(h) + D_n N(h .) / c(h)  p_{n-1}(w | h without its first token)

where the lower orders take N(. h w) for c(h w), and order 0 is uniform. D_k = n_1 / (n_1 + 2 n_2), of the runs of order
k that are counted once and twice. A run that was never seen leaves all to the next lower order.
"""

from dataclasses import dataclass

import numpy as np
import torch

INTEGER_BITS = 62


@dataclass(frozen=True)
class _Order:
    """Sorted runs of one length with their counts, and their beginnings (all but the last token) with what follows."""

    runs: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray  # of the counts of all runs that begin so
    followers: np.ndarray  # how many different tokens follow
    discount: float


class KneserNey:
    """An n-gram model.

    Args:
        tokens: training text, int64 [tokens], at least `order` of them.
        vocabulary_size: ids are below it.
        order: tokens of a run, n; `vocabulary_size` ** n must fit into 62 bits.

    Raises:
        ValueError: the vocabulary is too large for the order, or there is too little text.
    """

    def __init__(self, tokens: np.ndarray, vocabulary_size: int, order: int):
        if order * np.log2(vocabulary_size) > INTEGER_BITS:
            raise ValueError(
                f"order={order} with vocabulary_size={vocabulary_size}: a run does not fit into {INTEGER_BITS} bits; "
                "give a smaller order"
            )
        if len(tokens) < order:
            raise ValueError(f"order={order}: the text has only {len(tokens)} tokens; give more text")
        self.vocabulary_size, self.order = vocabulary_size, order
        tokens = np.asarray(tokens, dtype=np.int64)
        runs, counts = np.unique(self._codes(tokens, order), return_counts=True)
        orders = [self._order(runs, counts)]
        for size in range(order - 1, 0, -1):
            # Each different run of one token more says once what its last tokens are.
            runs, counts = np.unique(runs % vocabulary_size**size, return_counts=True)
            orders.append(self._order(runs, counts))
        self.orders = orders[::-1]

    def token_losses(self, ids: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of every token given those before it in its row.

        Args:
            ids: int64 [rows, length], length at least 2.

        Returns:
            Nats, float32 [rows, length - 1]: column t is the loss of token t + 1.
        """
        losses = [self._row_losses(row) for row in ids.numpy()]
        return torch.from_numpy(np.stack(losses)).float()

    def _row_losses(self, row: np.ndarray) -> np.ndarray:
        probability = np.full(len(row) - 1, 1 / self.vocabulary_size)
        for size, order in enumerate(self.orders, start=1):
            # The first tokens of a text have fewer before them than the order asks for: lower ones speak for them.
            first = max(size - 1, 1)
            codes = self._codes(row, size)[first - size + 1 :]
            own, lower = probability[first - 1 :], probability[first - 1 :].copy()
            place, known = _places(order.contexts, codes // self.vocabulary_size)
            seen, counted = _places(order.runs, codes)
            count = np.where(counted, order.counts[seen], 0)
            total = order.totals[place]
            mixed = (np.maximum(count - order.discount, 0) + order.discount * order.followers[place] * lower) / total
            own[:] = np.where(known, mixed, lower)
        return -np.log(probability)

    def _codes(self, tokens: np.ndarray, size: int) -> np.ndarray:
        """Every run of `size` tokens as one number, int64 [tokens - size + 1]."""
        codes = np.zeros(len(tokens) - size + 1, dtype=np.int64)
        for offset in range(size):
            codes = codes * self.vocabulary_size + tokens[offset : offset + len(codes)]
        return codes

    def _order(self, runs: np.ndarray, counts: np.ndarray) -> _Order:
        contexts, first = np.unique(runs // self.vocabulary_size, return_index=True)
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        # A text of a few tokens may have no run that is counted once; any discount between 0 and 1 is a model then.
        discount = once / (once + 2 * twice) if once else 0.5
        totals = np.add.reduceat(counts, first)
        return _Order(runs, counts, contexts, totals, np.diff(np.append(first, len(runs))), float(discount))


def _places(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where numbers stand in a sorted array (anywhere for those that do not), and whether they do."""
    place = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return place, values[place] == wanted
