"""``KnownKeys``: which keys a remote store was seen to have."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from lmcache.keys import CacheKey


class KnownKeys:
    """At most ``capacity`` of them, the ones seen last. *Fresh* for ``seconds``; later they are likely to be there
    still, but better asked for again. Thread-safe.
    """

    def __init__(self, seconds: float, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._fresh_until: OrderedDict[CacheKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._fresh_until)

    def __contains__(self, key: CacheKey) -> bool:
        return key in self._fresh_until

    def is_fresh(self, key: CacheKey) -> bool:
        return self._clock() < self._fresh_until.get(key, float("-inf"))

    def add(self, keys: Iterable[CacheKey]) -> None:
        until = self._clock() + self._seconds
        with self._lock:
            for key in keys:
                self._fresh_until[key] = until
                self._fresh_until.move_to_end(key)
            while len(self._fresh_until) > self._capacity:
                self._fresh_until.popitem(last=False)

    def discard(self, key: CacheKey) -> bool:
        """Whether it was known."""
        with self._lock:
            return self._fresh_until.pop(key, None) is not None

    def clear(self) -> int:
        """Forget all; how many these were."""
        with self._lock:
            count = len(self._fresh_until)
            self._fresh_until.clear()
        return count

    def keys(self) -> list[CacheKey]:
        """Those seen longest ago first."""
        with self._lock:
            return list(self._fresh_until)
