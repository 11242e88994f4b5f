"""Chunks that are to be read from a remote store, and everyone who waits for them."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj

_MAX_BATCH = 8


@dataclass(eq=False)
class Read:
    """One chunk, however many ask for it."""

    key: CacheKey
    futures: list[Future[MemoryObj | None]] = field(default_factory=list)


class Reads:
    """First in, first out. Thread-safe."""

    def __init__(self, threads: int) -> None:
        """``threads``: how many call :meth:`take`; they share what waits."""
        self._threads = threads
        self._lock = threading.Lock()
        self._waiting: deque[Read] = deque()
        self._under_way: dict[CacheKey, Read] = {}

    def add(self, key: CacheKey, future: Future[MemoryObj | None]) -> bool:
        """Whether it is a new one; else ``future`` gets what is being read already."""
        with self._lock:
            read = self._under_way.get(key)
            if read is None:
                read = self._under_way[key] = Read(key)
                self._waiting.append(read)
                new = True
            else:
                new = False
            read.futures.append(future)
            return new

    def take(self) -> list[Read]:
        """What one thread is to read next, in one go; each goes to :meth:`end` later."""
        with self._lock:
            count = min(_MAX_BATCH, -(-len(self._waiting) // self._threads))
            return [self._waiting.popleft() for _ in range(count)]

    def end(self, read: Read, obj: MemoryObj | None) -> None:
        """Hand ``obj``, whose reference is taken over, to everyone who waits for it."""
        with self._lock:
            del self._under_way[read.key]
        # A reference each, all before the first wakes up: whoever is last to give theirs back frees it.
        if obj is not None:
            for _ in read.futures[1:]:
                obj.ref_up()
        for future in read.futures:
            future.set_result(obj)

    def give_up(self) -> None:
        """All that wait are misses."""
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
        for read in waiting:
            self.end(read, None)
