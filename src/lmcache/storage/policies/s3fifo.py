"""S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from lmcache.storage.policies.interface import EvictionPolicy, K
from lmcache.storage.policies.victim_queue import VictimQueue

SMALL_SHARE = 0.1
MAX_USES = 3


class S3FIFOPolicy(EvictionPolicy[K]):
    """Three FIFO queues: what is used only once passes through a *small* one and never displaces the *main* one.

    New entries enter small, or main when the *ghost* queue remembers that they were evicted from small a short while
    ago. At the cold end of small an entry used more than once moves to main, another goes. At the cold end of main an
    entry that was used gets another round, with one use less. Sizes are counted in entries.
    """

    name = "S3FIFO"

    def __init__(self) -> None:
        self._small: VictimQueue[K] = VictimQueue()
        self._main: VictimQueue[K] = VictimQueue()
        self._ghost: OrderedDict[K, None] = OrderedDict()
        self._uses: dict[K, int] = {}
        self._proposed: K | None = None

    def insert(self, key: K) -> None:
        if key in self._uses:
            self.touch(key)
            return
        self._uses[key] = 0
        if key in self._ghost:
            del self._ghost[key]
            self._main.push(key)
        else:
            self._small.push(key)

    def touch(self, key: K) -> None:
        if key in self._uses:
            self._uses[key] = min(self._uses[key] + 1, MAX_USES)

    def remove(self, key: K) -> None:
        if self._uses.pop(key, None) is None:
            return
        if key in self._small and key == self._proposed:
            self._remember(key)
        self._small.discard(key)
        self._main.discard(key)

    def victim(self, evictable: Callable[[K], bool]) -> K | None:
        searches = [self._search_small, self._search_main]
        if len(self._small) < SMALL_SHARE * len(self):
            searches.reverse()
        for everywhere in (False, True):
            for search in searches:
                self._proposed = search(evictable, everywhere)
                if self._proposed is not None:
                    return self._proposed
        return None

    def _search_small(self, evictable: Callable[[K], bool], everywhere: bool) -> K | None:
        while (key := self._small.search(evictable, everywhere=everywhere)) is not None and self._uses[key] > 1:
            self._small.discard(key)
            self._main.push(key)
            self._uses[key] = 0
        return key

    def _search_main(self, evictable: Callable[[K], bool], everywhere: bool) -> K | None:
        while (key := self._main.search(evictable, everywhere=everywhere)) is not None and self._uses[key] > 0:
            self._main.push(key)
            self._uses[key] -= 1
        return key

    def _remember(self, key: K) -> None:
        self._ghost[key] = None
        while len(self._ghost) > len(self._uses):
            self._ghost.popitem(last=False)

    def __iter__(self) -> Iterator[K]:
        yield from self._small
        yield from self._main

    def __len__(self) -> int:
        return len(self._uses)
