"""Losses by position, kept in a size that does not depend on how much was read."""

import numpy as np

# Stretches that a curve has at most; then two neighbours become one.
MOST_STRETCHES = 64


class LossCurve:
    """Mean losses over stretches of equally many tokens, and over all of them.

    Args:
        start: the position of the first token, counted from the first one ever read.
        width: tokens of a stretch, to begin with.

    Attributes:
        length: tokens so far; count: how many of them had a loss.
    """

    def __init__(self, start: int, width: int):
        self.start, self.width = start, width
        self.length, self.count, self.total = 0, 0, 0.0
        self._sums, self._counts = np.zeros(MOST_STRETCHES), np.zeros(MOST_STRETCHES, dtype=np.int64)

    @property
    def mean(self) -> float | None:
        """The mean loss of all tokens, nats; None before the first one."""
        return self.total / self.count if self.count else None

    def add(self, losses: np.ndarray) -> None:
        """Losses of the tokens that follow, in nats, float [tokens]; NaN for those that nothing predicted."""
        while self.length + len(losses) > MOST_STRETCHES * self.width:
            self._halve()
        known = ~np.isnan(losses)
        places = (self.length + np.arange(len(losses)))[known] // self.width
        np.add.at(self._sums, places, losses[known])
        np.add.at(self._counts, places, 1)
        self.length += len(losses)
        self.count += int(known.sum())
        self.total += float(losses[known].sum(dtype=np.float64))

    def points(self) -> list[tuple[float, float]]:
        """The middle of every stretch (a position) and its mean loss; one that is less than half full waits."""
        full = np.flatnonzero(2 * self._counts >= self.width)
        middles = self.start + (full + 0.5) * self.width
        return list(zip(middles.tolist(), (self._sums[full] / self._counts[full]).tolist(), strict=True))

    def _halve(self) -> None:
        """Stretches of twice the width in the first half, room in the second."""
        for array in (self._sums, self._counts):
            array[: MOST_STRETCHES // 2] = array[::2] + array[1::2]
            array[MOST_STRETCHES // 2 :] = 0
        self.width *= 2
