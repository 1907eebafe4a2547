"""What earlier requests have read, for later ones that begin alike: these read only what is new.

Reading on from a learned context gives what reading the whole text at once gives, so nothing but time changes.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from .. import TTTE2ECache
from ..context import LearnedContext


@dataclass(frozen=True, eq=False)
class Prefix:
    """A beginning that was read.

    Attributes:
        origin: the named context that it goes on from; None for none.
        learn_from: as in `generate`.
        ids: int64 [tokens], on the CPU.
        cache: has read them behind `origin`.
    """

    origin: LearnedContext | None
    learn_from: str
    ids: torch.Tensor
    cache: TTTE2ECache

    def begins(self, origin: LearnedContext | None, learn_from: str, ids: torch.Tensor) -> bool:
        """Whether `ids` go on from here, with at least one token of their own."""
        count = len(self.ids)
        return (
            self.origin is origin
            and self.learn_from == learn_from
            and count < len(ids)
            and torch.equal(self.ids, ids[:count])
        )


class PrefixStore:
    """The last used beginnings, as far as they fit into a number of bytes. Safe to use from several threads.

    What is learned from a prompt alone (`learn_from="prompt"`) depends on where the prompt ends, and is not kept.

    Args:
        most_bytes: 0 keeps nothing.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self._kept: OrderedDict[Prefix, int] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of all that is kept; tensors that two of them share count twice."""
        return sum(self._kept.values())

    def longest(self, origin: LearnedContext | None, learn_from: str, ids: torch.Tensor) -> Prefix | None:
        """The longest beginning of `ids` [tokens] that was read behind `origin`, if any."""
        ids = ids.cpu()
        with self._lock:
            found = [prefix for prefix in self._kept if prefix.begins(origin, learn_from, ids)]
            if not found:
                return None
            best = max(found, key=lambda prefix: len(prefix.ids))
            self._kept.move_to_end(best)
            return best

    def keep(self, origin: LearnedContext | None, learn_from: str, ids: torch.Tensor, cache: TTTE2ECache) -> None:
        """Keep what has been read: `ids` [tokens] behind `origin`. The cache must not be changed afterwards."""
        if learn_from == "prompt" or cache.nbytes > self.most_bytes:
            return
        new = Prefix(origin, learn_from, ids.cpu().clone(), cache)
        with self._lock:
            for old in [prefix for prefix in self._kept if _same(prefix, new)]:
                del self._kept[old]
            self._kept[new] = cache.nbytes
            while self.nbytes > self.most_bytes:
                self._kept.popitem(last=False)


def _same(one: Prefix, other: Prefix) -> bool:
    return one.origin is other.origin and one.learn_from == other.learn_from and torch.equal(one.ids, other.ids)
