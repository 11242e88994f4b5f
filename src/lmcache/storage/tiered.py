"""All tiers as one: where a chunk is, how it gets up to host memory, how it goes down."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.observability.metrics import Metrics
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.interface import StorageTier, TierStats


class TieredStorage:
    """Host memory first, then slower tiers in order.

    Every chunk passes through host memory. With ``keep_in_memory`` off, it stays there only on its way.
    """

    def __init__(
        self,
        memory: LocalCPUTier,
        slower: Sequence[StorageTier] = (),
        *,
        keep_in_memory: bool = True,
        metrics: Metrics | None = None,
    ) -> None:
        self.memory = memory
        self.slower = tuple(slower)
        self._keep_in_memory = keep_in_memory
        self._metrics = metrics or Metrics()

    @property
    def tiers(self) -> tuple[StorageTier, ...]:
        return (self.memory, *self.slower)

    def allocate(self, spec: KVSpec) -> MemoryObj | None:
        """Host memory for a chunk, with one reference; None when everything there is in use."""
        return self.memory.allocate(spec)

    def put(self, key: CacheKey, obj: MemoryObj) -> bool:
        """Keep ``obj``: in memory at once, in slower tiers behind the caller's back. Whether any tier took it."""
        kept = self._keep_in_memory and self.memory.submit_put(key, obj)
        for tier in self.slower:
            if tier.submit_put(key, obj):
                self._metrics.written(tier.name, obj.spec.nbytes)
                kept = True
            else:
                self._metrics.dropped(tier.name)
        return kept

    def contains(self, key: CacheKey) -> bool:
        return self._tier_of(key) is not None

    def locate(self, keys: Iterable[CacheKey]) -> list[StorageTier]:
        """The fastest tier that holds each of the leading keys, up to the first that none holds. Indexes only."""
        found = []
        in_memory = self.memory.contains
        for key in keys:
            tier = self.memory if in_memory(key) else self._tier_of(key)
            if tier is None:
                break
            found.append(tier)
        return found

    def fetch(self, key: CacheKey, tier: StorageTier) -> Future[MemoryObj | None]:
        """Start bringing ``key`` into host memory. The future's object carries a reference for the caller."""
        read = tier.submit_get(key)
        if tier is self.memory:
            return read
        promoted: Future[MemoryObj | None] = Future()
        read.add_done_callback(lambda done: promoted.set_result(self._arrived(key, tier, done.result())))
        return promoted

    def pin(self, key: CacheKey) -> StorageTier | None:
        """Forbid eviction of ``key`` in the fastest tier that holds it; undo with that tier's ``unpin``."""
        return next((tier for tier in self.tiers if tier.pin(key)), None)

    def clear(self) -> int:
        """Forget every entry that nobody uses, in every tier; how many chunks went."""
        self.flush(10.0)
        return max(tier.clear() for tier in self.tiers)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until slower tiers have written what they accepted; False when ``timeout`` seconds were not enough."""
        deadline = None if timeout is None else time.monotonic() + timeout
        done = True
        for tier in self.slower:
            done &= tier.flush(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return done

    def stats(self) -> dict[str, TierStats]:
        return {tier.name: tier.stats() for tier in self.tiers}

    def close(self) -> None:
        """Slowest first: what waits to be written lies in host memory. Idempotent."""
        for tier in reversed(self.tiers):
            tier.close()

    def _tier_of(self, key: CacheKey) -> StorageTier | None:
        return next((tier for tier in self.tiers if tier.contains(key)), None)

    def _arrived(self, key: CacheKey, tier: StorageTier, obj: MemoryObj | None) -> MemoryObj | None:
        """Promote what was read. Runs before anybody else sees ``obj``, so its reference is still there."""
        if obj is not None:
            self._metrics.read(tier.name, obj.spec.nbytes)
            if self._keep_in_memory:
                self.memory.submit_put(key, obj)
        return obj
