"""Who works with the models when: one thread at a time, in the order in which they asked."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ModelQueue:
    """Turns of several threads, first come, first served.

    Long work is done in many short turns, so that everybody waits for at most one turn of each of the others.
    """

    def __init__(self):
        self._tickets: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def length(self) -> int:
        """Those who work or wait."""
        return len(self._tickets)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait, and be alone with the models within the block."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def let_others_go_first(self) -> None:
        """Within a turn: end it and line up again, where others wait."""
        if self.length > 1:
            self._end()
            self._begin()

    def _begin(self) -> None:
        ticket = object()
        with self._changed:
            self._tickets.append(ticket)
            self._changed.wait_for(lambda: self._tickets[0] is ticket)

    def _end(self) -> None:
        with self._changed:
            self._tickets.popleft()
            self._changed.notify_all()
