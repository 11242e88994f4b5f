"""First in, first out."""

from __future__ import annotations

from lmcache.storage.policies.interface import K
from lmcache.storage.policies.lru import LRUPolicy


class FIFOPolicy(LRUPolicy[K]):
    """Evicts the oldest entry, however often it was used."""

    name = "FIFO"

    def insert(self, key: K) -> None:
        if key not in self._queue:
            self._queue.push(key)

    def touch(self, key: K) -> None:
        pass
