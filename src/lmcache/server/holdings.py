"""What one session holds of the server's memory, by handle."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj
from lmcache.server.protocol import Place, SpecTable
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.tiered import TieredStorage


class Holdings:
    """References and pins of one client. All of them go back when the client does. Thread-safe."""

    def __init__(self, storage: TieredStorage, memory: LocalCPUTier) -> None:
        self._storage = storage
        self._memory = memory
        self._lock = threading.Lock()
        self._next = 0
        self._objs: dict[int, MemoryObj] = {}
        self._pins: list[list[CacheKey]] = []
        self._ended = False

    def add(self, obj: MemoryObj, specs: SpecTable) -> Place | None:
        """:meth:`add_all` of one."""
        places = self.add_all([obj], specs)
        return places[0] if places else None

    def add_all(self, objs: Sequence[MemoryObj], specs: SpecTable) -> list[Place]:
        """Take over a reference to each; no places, and they are given back, when the client is gone."""
        lies = self._memory.pool.places_of(objs)
        with self._lock:
            if not self._ended:
                handles = range(self._next, self._next + len(objs))
                self._next = handles.stop
                self._objs.update(zip(handles, objs, strict=True))
                return [
                    Place(handle, slab, offset, specs.add(obj.spec))
                    for handle, obj, (slab, offset) in zip(handles, objs, lies, strict=True)
                ]
        for obj in objs:
            obj.ref_down()
        return []

    def borrow(self, handle: int) -> MemoryObj:
        """The object with a reference for the caller.

        Raises:
            ValueError: there is no such handle.
        """
        with self._lock:
            if (obj := self._objs.get(handle)) is None:
                raise ValueError(f"no handle {handle}")
            return obj.ref_up()

    def release(self, handles: Iterable[int]) -> None:
        """Unknown ones are ignored."""
        with self._lock:
            objs = [self._objs.pop(handle, None) for handle in handles]
        for obj in objs:
            if obj is not None:
                obj.ref_down()

    def pin(self, keys: list[CacheKey]) -> int:
        count = self._storage.pin(keys)
        if count:
            with self._lock:
                late = self._ended
                if not late:
                    self._pins.append(keys)
            if late:
                self._storage.unpin(keys)
        return count

    def unpin(self, keys: list[CacheKey]) -> None:
        """Only what this client has pinned itself."""
        with self._lock:
            if keys not in self._pins:
                return
            self._pins.remove(keys)
        self._storage.unpin(keys)

    def end(self) -> None:
        """Give everything back. Idempotent."""
        with self._lock:
            self._ended = True
            objs, self._objs = list(self._objs.values()), {}
            pins, self._pins = self._pins, []
        for obj in objs:
            obj.ref_down()
        for keys in pins:
            self._storage.unpin(keys)
