"""Chunks that wait to be written to a remote store, and those being written."""

from __future__ import annotations

import threading

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj

_BURST_BYTES = 32 << 20


class Uploads:
    """First in, first out, bounded by the host memory that is held. Holds a reference to each object. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._bytes = 0
        self._waiting: dict[CacheKey, MemoryObj] = {}
        self._writing: dict[CacheKey, MemoryObj] = {}
        self._letting_go = 0
        self._closed = False

    def __contains__(self, key: CacheKey) -> bool:
        # In this order, that of the way through: a key that moves on meanwhile is still found.
        return key in self._waiting or key in self._writing

    def add(self, key: CacheKey, obj: MemoryObj) -> bool:
        """False when there is no room for it."""
        with self._changed:
            if key in self:
                return True
            if self._closed or self._bytes + obj.spec.nbytes > self._max_bytes:
                return False
            self._waiting[key] = obj.ref_up()
            self._bytes += obj.spec.nbytes
            self._changed.notify_all()
            return True

    def get(self, key: CacheKey) -> MemoryObj | None:
        """With a reference for the caller."""
        with self._changed:
            obj = self._waiting.get(key) or self._writing.get(key)
            return None if obj is None else obj.ref_up()

    def cancel(self, key: CacheKey) -> bool:
        """Take ``key`` out, if it still waits."""
        with self._changed:
            obj = self._waiting.pop(key, None)
            if obj is None:
                return False
            self._letting_go += 1
        self._let_go(obj)
        return True

    def cancel_all(self) -> int:
        """Take out all that wait; how many these were."""
        return sum(self.cancel(key) for key in list(self._waiting))

    def take(self) -> list[tuple[CacheKey, MemoryObj]]:
        """Wait for some to be written next; empty when closed and nothing waits. Each goes to :meth:`end` later."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            burst: list[tuple[CacheKey, MemoryObj]] = []
            room = _BURST_BYTES
            while self._waiting and room > 0:
                key = next(iter(self._waiting))
                obj = self._waiting[key]
                self._writing[key] = obj
                del self._waiting[key]
                burst.append((key, obj))
                room -= obj.spec.nbytes
            return burst

    def end(self, key: CacheKey) -> None:
        """What was taken has been written, or was given up."""
        with self._changed:
            obj = self._writing.pop(key)
            self._letting_go += 1
        self._let_go(obj)

    def _let_go(self, obj: MemoryObj) -> None:
        # Outside the lock, as it ends in the pool; only then is it gone for those who wait.
        nbytes = obj.spec.nbytes
        try:
            obj.ref_down()
        finally:
            with self._changed:
                self._letting_go -= 1
                self._bytes -= nbytes
                self._changed.notify_all()

    def wait(self, timeout: float | None) -> bool:
        """Wait until nothing is left, and every reference was given back."""
        with self._changed:
            return self._changed.wait_for(self._is_empty, timeout)

    def _is_empty(self) -> bool:
        return not (self._waiting or self._writing or self._letting_go)

    def close(self) -> None:
        """No more are taken in; those that wait are dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.cancel_all()
