"""Least recently used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lmcache.storage.policies.interface import EvictionPolicy, K
from lmcache.storage.policies.victim_queue import VictimQueue


class LRUPolicy(EvictionPolicy[K]):
    """Evicts the entry whose last use is the longest ago."""

    name = "LRU"

    def __init__(self) -> None:
        self._queue: VictimQueue[K] = VictimQueue()

    def insert(self, key: K) -> None:
        self._queue.push(key)

    def touch(self, key: K) -> None:
        if key in self._queue:
            self._queue.push(key)

    def remove(self, key: K) -> None:
        self._queue.discard(key)

    def victim(self, evictable: Callable[[K], bool]) -> K | None:
        key = self._queue.search(evictable)
        return self._queue.search(evictable, everywhere=True) if key is None else key

    def __iter__(self) -> Iterator[K]:
        return iter(self._queue)

    def __len__(self) -> int:
        return len(self._queue)
