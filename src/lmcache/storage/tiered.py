"""All tiers as one store: look-up across them, promotion into host memory, writes behind the caller's back."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.observability.logging import init_logger, log_limited
from lmcache.observability.metrics import Metrics
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.inquiry import Inquiry
from lmcache.storage.interface import StorageTier, TierStats
from lmcache.storage.kv_storage import Found, KVStorage

logger = init_logger(__name__)

T = TypeVar("T")


class TieredStorage(KVStorage):
    """Host memory first, then slower tiers in the given order. Thread-safe; a fault of a tier is a miss, never raised.

    What is put goes to memory at once and to every slower tier when that gets to it. What is read from a slower tier
    stays in memory, and goes to the tiers between. ``sources`` are looked in last, and nothing is put there. With
    ``keep_in_memory=False`` host memory only stages what moves to and from the slower tiers.
    """

    def __init__(
        self,
        memory: LocalCPUTier,
        slower: Sequence[StorageTier] = (),
        *,
        sources: Sequence[StorageTier] = (),
        keep_in_memory: bool = True,
        metrics: Metrics | None = None,
    ) -> None:
        self.memory = memory
        self.metrics = metrics or Metrics()
        self._slower = tuple(slower)
        self._keeping: tuple[StorageTier, ...] = (memory, *self._slower) if keep_in_memory else self._slower
        self._sources = tuple(sources)
        self._keep_in_memory = keep_in_memory
        # Those that do not know what they hold without asking their medium.
        self._asked = tuple(tier for tier in self._slower if tier.must_ask)
        self._lock = threading.Lock()
        self._pins: defaultdict[CacheKey, list[list[tuple[StorageTier, CacheKey]]]] = defaultdict(list)
        self._clears = 0
        self._closed = False
        self.metrics.watch_tiers(self.stats)

    @property
    def asks(self) -> bool:
        """Whether :meth:`ask` can find out anything."""
        return bool(self._asked)

    # Looking

    def find(self, keys: Sequence[CacheKey]) -> list[StorageTier]:
        """See :meth:`KVStorage.find`. Touches only indexes; about 0.1 µs a key."""
        if self._closed:
            return []
        probes = [(tier, tier.contains) for tier in (*self._keeping, *self._sources)]
        hits: list[StorageTier] = []
        try:
            for key in keys:
                for tier, contains in probes:
                    if contains(key):
                        hits.append(tier)
                        break
                else:
                    break
        except Exception as error:
            self._gave_up("lookup", error)
        return hits

    def holds(self, keys: Sequence[CacheKey]) -> list[bool]:
        return [bool(self.find([key])) for key in keys]

    def ask(self, keys: Sequence[CacheKey], timeout: float) -> Inquiry:
        """See :meth:`KVStorage.ask`."""
        asked: list[Future[None]] = []
        if self._asked and not self._closed:
            missing = keys[len(self.find(keys)) :]
            for tier in self._asked if missing else ():
                answer = self._attempt("ask", partial(tier.ask, missing), None)
                if answer is not None:
                    asked.append(answer)
        return Inquiry(asked, timeout)

    # Getting

    def acquire(self, key: CacheKey) -> Found | None:
        """See :meth:`KVStorage.acquire`."""
        (found,) = self.acquire_each([key])
        return found

    def acquire_leading(self, keys: Sequence[CacheKey]) -> list[Found]:
        hits: list[Found] = []
        for key in keys:
            if (found := self._acquire(key)) is None:
                break
            hits.append(found)
        self._count_held(hits)
        return hits

    def acquire_each(self, keys: Sequence[CacheKey]) -> list[Found | None]:
        found = [self._acquire(key) for key in keys]
        self._count_held(found)
        return found

    def _acquire(self, key: CacheKey) -> Found | None:
        if self._keep_in_memory and (obj := self.memory.get(key)) is not None:
            return Found(self.memory, obj, None)
        tier = next(iter(self.find([key])), None)
        if tier is None:
            return None
        return Found(tier, None, self.fetch(key, tier))

    def _count_held(self, found: Sequence[Found | None]) -> None:
        if nbytes := sum(each.obj.spec.nbytes for each in found if each is not None and each.obj is not None):
            self.metrics.read(self.memory.name, nbytes)

    def fetch(self, key: CacheKey, tier: StorageTier) -> Future[MemoryObj | None]:
        """Start reading ``key`` from ``tier``. What it gives is in memory when the future is done, and on its way to
        the other tiers that are faster.

        The future gives an object with one reference for the caller, or None for a miss. It never raises and cannot
        be cancelled (the reference would be lost).
        """
        promoted: Future[MemoryObj | None] = Future()
        promoted.set_running_or_notify_cancel()
        with self._lock:
            clears = self._clears
        read = self._attempt(f"{tier.name}_read", lambda: tier.submit_get(key), None)
        if read is None:
            promoted.set_result(None)
        else:
            read.add_done_callback(partial(self._arrived, key, tier, clears, promoted))
        return promoted

    def _arrived(
        self,
        key: CacheKey,
        tier: StorageTier,
        clears: int,
        promoted: Future[MemoryObj | None],
        read: Future[MemoryObj | None],
    ) -> None:
        obj = self._attempt(f"{tier.name}_read", read.result, None)
        if obj is None:
            promoted.set_result(None)
            return
        self.metrics.read(tier.name, obj.spec.nbytes)
        with self._lock:
            # A read that was under way during `clear` must not bring back what was forgotten.
            if clears == self._clears and not self._closed:
                for faster in itertools.takewhile(lambda each: each is not tier, self._keeping):
                    self._put_into(faster, key, obj)
        promoted.set_result(obj)

    # Putting

    def allocate(self, spec: KVSpec) -> MemoryObj | None:
        """See :meth:`KVStorage.allocate`."""
        return self._attempt("allocate", lambda: self.memory.allocate(spec), None)

    def put(self, key: CacheKey, obj: MemoryObj) -> bool:
        """See :meth:`KVStorage.put`."""
        if self._closed:
            return False
        kept = False
        for tier in self._keeping:
            if self._put_into(tier, key, obj):
                kept = True
                self.metrics.written(tier.name, obj.spec.nbytes)
            else:
                self.metrics.dropped(tier.name)
        return kept

    def renew(self, key: CacheKey) -> bool:
        """See :meth:`KVStorage.renew`."""
        obj = self.memory.get(key) if self._keep_in_memory else None
        if obj is None:
            return self.contains(key)
        with obj:
            for tier in self._slower:
                self._put_into(tier, key, obj)
        return True

    def _put_into(self, tier: StorageTier, key: CacheKey, obj: MemoryObj) -> bool:
        return self._attempt(f"{tier.name}_put", lambda: tier.submit_put(key, obj), False)

    # Keeping

    def pin(self, keys: Sequence[CacheKey]) -> int:
        """See :meth:`KVStorage.pin`."""
        held: list[tuple[StorageTier, CacheKey]] = []
        count = 0
        for key in keys:
            tiers = [tier for tier in self._keeping if self._attempt("pin", partial(tier.pin, key), False)]
            if not tiers:
                break
            held.extend((tier, key) for tier in tiers)
            count += 1
        if held:
            # The last key stands for the whole chain, so an unpin undoes just what its pin did.
            with self._lock:
                self._pins[keys[-1]].append(held)
        return count

    def unpin(self, keys: Sequence[CacheKey]) -> None:
        """See :meth:`KVStorage.unpin`."""
        if not keys:
            return
        with self._lock:
            stack = self._pins.get(keys[-1])
            held = stack.pop() if stack else []
            if not stack:
                self._pins.pop(keys[-1], None)
        for tier, key in held:
            self._attempt("unpin", partial(tier.unpin, key), None)

    def clear(self) -> int:
        """Forget everything that is not pinned, in every tier, also what is being written, read or leased (whoever
        holds an object keeps it); returns how many entries went, each tier's counted."""
        with self._lock:
            self._clears += 1
        return sum(self._attempt("clear", partial(_clear, tier), 0) for tier in (*self._keeping, *self._sources))

    # The whole

    def flush(self, timeout: float | None = None) -> bool:
        """See :meth:`KVStorage.flush`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for tier in self._keeping:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._attempt("flush", partial(tier.flush, left), False):
                return False
        return True

    def stats(self) -> dict[str, TierStats]:
        """See :meth:`KVStorage.stats`."""
        return {tier.name: tier.stats() for tier in (self.memory, *self._slower, *self._sources)}

    def close(self) -> None:
        """Write what is queued, give everything back. Slow tiers first: they hold host memory. Idempotent."""
        with self._lock:
            self._closed = True
            self._pins.clear()
        for tier in (*self._sources, *reversed(self._slower), self.memory):
            self._attempt(f"{tier.name}_close", tier.close, None)

    def _attempt(self, what: str, call: Callable[[], T], fallback: T) -> T:
        try:
            return call()
        except Exception as error:
            self._gave_up(what, error)
            return fallback

    def _gave_up(self, what: str, error: Exception) -> None:
        self.metrics.failure(what)
        log_limited(
            logger,
            logging.ERROR,
            f"storage:{what}:{type(error).__name__}",
            "storage: %s failed and counts as a miss: %r",
            what,
            error,
            exc_info=error,
        )


def _clear(tier: StorageTier) -> int:
    count = tier.clear()
    # What `clear` spared is pinned, or in flight: being written, say, and that must not come back later.
    return count + sum(tier.remove(key) for key in tier.keys())  # noqa: SIM118 - not a mapping
