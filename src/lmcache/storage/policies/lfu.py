"""Least frequently used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sortedcontainers import SortedDict

from lmcache.storage.policies.interface import EvictionPolicy, K
from lmcache.storage.policies.victim_queue import VictimQueue


class LFUPolicy(EvictionPolicy[K]):
    """Evicts the entry with the fewest uses since it came; of equals the one whose last use is the longest ago."""

    name = "LFU"

    def __init__(self) -> None:
        self._uses: dict[K, int] = {}
        self._by_uses: SortedDict[int, VictimQueue[K]] = SortedDict()

    def insert(self, key: K) -> None:
        if key in self._uses:
            self.touch(key)
        else:
            self._put(key, 0)

    def touch(self, key: K) -> None:
        if key in self._uses:
            uses = self._uses[key] + 1
            self.remove(key)
            self._put(key, uses)

    def remove(self, key: K) -> None:
        uses = self._uses.pop(key, None)
        if uses is not None:
            queue = self._by_uses[uses]
            queue.discard(key)
            if not queue:
                del self._by_uses[uses]

    def victim(self, evictable: Callable[[K], bool]) -> K | None:
        for everywhere in (False, True):
            queue: VictimQueue[K]
            for queue in self._by_uses.values():
                key = queue.search(evictable, everywhere=everywhere)
                if key is not None:
                    return key
        return None

    def _put(self, key: K, uses: int) -> None:
        self._uses[key] = uses
        queue = self._by_uses.get(uses)
        if queue is None:
            queue = self._by_uses[uses] = VictimQueue()
        queue.push(key)

    def __iter__(self) -> Iterator[K]:
        for queue in self._by_uses.values():
            yield from queue

    def __len__(self) -> int:
        return len(self._uses)
