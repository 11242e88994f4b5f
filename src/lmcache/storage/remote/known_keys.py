"""``KnownKeys``: which keys a remote store was seen to have."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from lmcache.keys import CacheKey


class KnownKeys:
    """Remembers each for ``seconds``, at most ``capacity`` of them, the ones seen last. Thread-safe."""

    def __init__(self, seconds: float, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._until: OrderedDict[CacheKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, key: CacheKey) -> bool:
        until = self._until.get(key)
        return until is not None and self._clock() < until

    def add(self, keys: Iterable[CacheKey]) -> None:
        until = self._clock() + self._seconds
        with self._lock:
            for key in keys:
                self._until[key] = until
                self._until.move_to_end(key)
            while len(self._until) > self._capacity:
                self._until.popitem(last=False)

    def discard(self, key: CacheKey) -> bool:
        """Whether it was known."""
        with self._lock:
            until = self._until.pop(key, None)
        return until is not None and self._clock() < until

    def clear(self) -> int:
        """Forget all; how many these were."""
        with self._lock:
            count = len(self._until)
            self._until.clear()
        return count

    def keys(self) -> list[CacheKey]:
        """Those seen longest ago first."""
        with self._lock:
            now = self._clock()
            return [key for key, until in self._until.items() if now < until]
