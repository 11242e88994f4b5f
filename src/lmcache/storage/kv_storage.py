"""``KVStorage``: what an engine keeps KV in, whether its tiers are in this process or in a server's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.observability.metrics import Metrics
from lmcache.storage.inquiry import Inquiry
from lmcache.storage.interface import TierStats


class Named(Protocol):
    """A tier, as far as those who use its chunks care."""

    @property
    def name(self) -> str: ...


class Found(NamedTuple):
    """A hit: the tier that has it, and the object with one reference for the caller, or the read that will give it."""

    tier: Named
    obj: MemoryObj | None
    read: Future[MemoryObj | None] | None


class KVStorage(ABC):
    """All tiers as one store. Thread-safe; a fault is a miss, never raised."""

    metrics: Metrics

    @abstractmethod
    def find(self, keys: Sequence[CacheKey]) -> Sequence[Named]:
        """The fastest tier of each leading hit: as long as the run of ``keys`` from the first that are all there."""

    def contains(self, key: CacheKey) -> bool:
        return bool(self.find([key]))

    @abstractmethod
    def holds(self, keys: Sequence[CacheKey]) -> list[bool]:
        """:meth:`contains` of each."""

    @abstractmethod
    def ask(self, keys: Sequence[CacheKey], timeout: float) -> Inquiry:
        """Have the tiers find out which of ``keys`` they hold, as far as that takes a question to their medium. Never
        blocks on the medium.

        Only what follows the leading hits is asked for. :meth:`find` then knows what was answered in time.
        """

    def acquire(self, key: CacheKey) -> Found | None:
        """Hold ``key``: the object if it lies in memory, else a read that has been started. None for a miss.

        A read gives an object with one reference for the caller, or None for a miss. It never raises and cannot be
        cancelled (the reference would be lost).
        """
        return self.acquire_each([key])[0]

    @abstractmethod
    def acquire_leading(self, keys: Sequence[CacheKey]) -> list[Found]:
        """:meth:`acquire` of the leading hits."""

    @abstractmethod
    def acquire_each(self, keys: Sequence[CacheKey]) -> list[Found | None]:
        """:meth:`acquire` of each."""

    @abstractmethod
    def allocate(self, spec: KVSpec) -> MemoryObj | None:
        """A fresh object with one reference, its bytes undefined; None when everything is in use."""

    @abstractmethod
    def put(self, key: CacheKey, obj: MemoryObj) -> bool:
        """Keep ``obj``, which came from :meth:`allocate`, in every tier that will have it; False when none will.

        Never waits for a medium. The caller keeps its own reference.
        """

    @abstractmethod
    def renew(self, key: CacheKey) -> bool:
        """Whether ``key`` is held anywhere. If memory has it, it counts as used in every tier, and a slower tier that
        lost it or had no room for it when it was put gets it again."""

    @abstractmethod
    def pin(self, keys: Sequence[CacheKey]) -> int:
        """Hold the leading hits among ``keys`` against eviction, in every tier that has them, until :meth:`unpin` with
        the same keys; how many these are."""

    @abstractmethod
    def unpin(self, keys: Sequence[CacheKey]) -> None:
        """Undo one :meth:`pin` of the same keys; without one, nothing happens."""

    @abstractmethod
    def clear(self) -> int:
        """Forget everything that is not pinned, in every tier; returns how many entries went, each tier's counted."""

    @abstractmethod
    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every accepted put is done; False when ``timeout`` seconds were not enough."""

    @abstractmethod
    def stats(self) -> dict[str, TierStats]:
        """What each tier counts, by its name, fastest first."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; from now on all is a miss. Idempotent."""
