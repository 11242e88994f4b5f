"""The memory tier: entries are the pool's own objects, so a hit costs no copy."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from lmcache.keys import CacheKey
from lmcache.memory.allocator import DEFAULT_SLAB_BYTES, SlabAllocator
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.memory.shared_memory import SharedMemorySource
from lmcache.storage.interface import StorageTier, TierStats
from lmcache.storage.policies import make_policy
from lmcache.storage.policies.interface import EvictionPolicy


class LocalCPUTier(StorageTier):
    """Owns the host pool. Everything that needs host memory asks :meth:`allocate`, which evicts as it must.

    An entry that is pinned, or that anybody besides this tier refers to, is never evicted.
    """

    name = "memory"

    def __init__(
        self,
        capacity_bytes: int,
        policy: str = "LRU",
        *,
        slab_bytes: int = DEFAULT_SLAB_BYTES,
        pin_memory: bool | None = None,
        shared: SharedMemorySource | None = None,
    ) -> None:
        """``policy`` is a name that :func:`make_policy` knows; the rest as in :class:`SlabAllocator`."""
        self.pool = SlabAllocator(capacity_bytes, slab_bytes=slab_bytes, pin_memory=pin_memory, shared=shared)
        # Always taken before the pool's lock, never while holding it.
        self._lock = threading.Lock()
        self._policy: EvictionPolicy[CacheKey] = make_policy(policy)
        self._entries: dict[CacheKey, MemoryObj] = {}
        self._pins: dict[CacheKey, int] = {}
        self._closed = False
        self._hits = 0
        self._misses = 0
        self._evictions = 0
        self._dropped_puts = 0
        self._failed_allocations = 0

    def allocate(self, spec: KVSpec) -> MemoryObj | None:
        """A fresh object with one reference, its bytes undefined; None when no eviction makes a hole that is large
        enough.

        Evicts what the policy proposes, up to as many bytes as are needed. If these lie too scattered to make one hole,
        the cheapest run of neighbours goes, whatever the policy thinks of them: evicting on in the policy's order would
        empty a third of a pool of mixed sizes before a large object fits.
        """
        obj = self.pool.allocate(spec)
        if obj is not None or spec.nbytes > self.pool.capacity_bytes:
            return obj
        with self._lock:
            evicted = 0
            while obj is None and evicted < spec.nbytes and (key := self._policy.victim(self._evictable)) is not None:
                evicted += self._entries[key].spec.nbytes
                self._evict(key)
                obj = self.pool.allocate(spec)
            # More than one round only if another thread took the hole.
            while obj is None and self._evict_neighbours(spec.nbytes):
                obj = self.pool.allocate(spec)
            if obj is None:
                self._failed_allocations += 1
        return obj

    def get(self, key: CacheKey) -> MemoryObj | None:
        """The entry with a reference for the caller, or None: :meth:`submit_get` without the future."""
        return self.get_each([key])[0]

    def get_each(self, keys: Iterable[CacheKey]) -> list[MemoryObj | None]:
        """:meth:`get` of each."""
        with self._lock:
            return [self._get(key) for key in keys]

    def get_leading(self, keys: Iterable[CacheKey]) -> list[MemoryObj]:
        """:meth:`get` of ``keys`` up to the first that is not here."""
        held: list[MemoryObj] = []
        with self._lock:
            for key in keys:
                if (obj := self._get(key)) is None:
                    break
                held.append(obj)
        return held

    def _get(self, key: CacheKey) -> MemoryObj | None:
        obj = self._entries.get(key)
        if obj is None:
            self._misses += 1
            return None
        self._hits += 1
        self._policy.touch(key)
        return obj.ref_up()

    def contains(self, key: CacheKey) -> bool:
        return key in self._entries

    def submit_put(self, key: CacheKey, obj: MemoryObj) -> bool:
        """As in :class:`StorageTier`.

        Raises:
            ValueError: ``obj`` did not come from :meth:`allocate`, so its bytes would not count against the capacity.
        """
        with self._lock:
            if self._closed:
                self._dropped_puts += 1
                return False
            if not self.pool.owns(obj):
                raise ValueError(f"{obj!r} is not of this tier's pool: take it from LocalCPUTier.allocate")
            if key not in self._entries:
                self._entries[key] = obj.ref_up()
                self._policy.insert(key)
            return True

    def submit_get(self, key: CacheKey) -> Future[MemoryObj | None]:
        future: Future[MemoryObj | None] = Future()
        future.set_result(self.get(key))
        return future

    def remove(self, key: CacheKey) -> bool:
        with self._lock:
            if key not in self._entries or key in self._pins:
                return False
            self._drop(key)
            return True

    def pin(self, key: CacheKey) -> bool:
        with self._lock:
            if key not in self._entries:
                return False
            self._pins[key] = self._pins.get(key, 0) + 1
            return True

    def unpin(self, key: CacheKey) -> None:
        with self._lock:
            pins = self._pins.pop(key, 0)
            if pins > 1:
                self._pins[key] = pins - 1

    def keys(self) -> Sequence[CacheKey]:
        with self._lock:
            return list(self._policy)

    def clear(self) -> int:
        with self._lock:
            keys = [key for key in self._entries if self._evictable(key)]
            for key in keys:
                self._drop(key)
            return len(keys)

    def flush(self, timeout: float | None = None) -> bool:
        return True

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                entries=len(self._entries),
                used_bytes=self.pool.used_bytes,
                capacity_bytes=self.pool.capacity_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                dropped_puts=self._dropped_puts,
                failures={"pool_full": self._failed_allocations} if self._failed_allocations else {},
            )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._pins.clear()
            for key in list(self._entries):
                self._drop(key)
        self.pool.close()

    def _evict_neighbours(self, nbytes: int) -> bool:
        key_at = {obj.offset: key for key, obj in self._entries.items() if self._evictable(key)}
        offsets = self.pool.make_way(nbytes, key_at)
        for offset in offsets or ():
            self._evict(key_at[offset])
        return offsets is not None

    def _evict(self, key: CacheKey) -> None:
        self._drop(key)
        self._evictions += 1

    def _evictable(self, key: CacheKey) -> bool:
        # A count of one is ours, and it cannot rise meanwhile: new references are taken under our lock.
        return key not in self._pins and self._entries[key].ref_count == 1

    def _drop(self, key: CacheKey) -> None:
        self._policy.remove(key)
        self._entries.pop(key).ref_down()
