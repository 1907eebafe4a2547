"""The visitors that a page has at the moment, each with a session of its own."""

import threading
import time
from collections.abc import Callable

from .session import Session


class Sessions:
    """Sessions by the key of their visitor. Safe to use from several threads.

    Args:
        most: visitors at a time; each one's context takes memory.
        patience: seconds after which a visitor who does nothing makes room for another one, where there is none.
    """

    def __init__(self, most: int = 32, patience: float = 1800):
        self.most, self.patience = most, patience
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def of(self, key: str, new: Callable[[], Session]) -> Session:
        """The session of a visitor.

        Args:
            new: makes one for a visitor who has none.

        Raises:
            ValueError: there are too many visitors.
        """
        with self._lock:
            if key not in self._open:
                if len(self._open) >= self.most and not self._make_room():
                    raise ValueError(
                        f"There are {self.most} visitors already, as many as this page takes; come back later"
                    )
                self._open[key] = new()
            return self._open[key]

    def _make_room(self) -> bool:
        """Drop the visitor who has done nothing for longest, if that is long enough."""
        idle = [(session.last_used, key) for key, session in self._open.items() if not session.is_working]
        last_used, key = min(idle, default=(time.monotonic(), ""))
        if time.monotonic() - last_used <= self.patience:
            return False
        self._open.pop(key).close()
        return True

    def find(self, key: str) -> Session | None:
        """The session of a visitor, None where there is none."""
        return self._open.get(key)

    def all(self) -> list[Session]:
        """The sessions of all visitors."""
        with self._lock:
            return list(self._open.values())

    def replace(self, key: str, session: Session) -> None:
        """Give a visitor another session; the old one is dropped."""
        self.drop(key)
        self.of(key, lambda: session)

    def drop(self, key: str) -> None:
        """Forget a visitor, if there is one; what is being read or written for them ends."""
        with self._lock:
            session = self._open.pop(key, None)
        if session is not None:
            session.close()
