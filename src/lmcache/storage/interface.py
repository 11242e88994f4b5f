"""What every tier of the cache offers. One conformance suite runs over all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj

Allocate: TypeAlias = Callable[[KVSpec], "MemoryObj | None"]
"""Gives a fresh object with one reference, evicting as it must; None when the pool is full of pinned entries."""


@dataclass(frozen=True)
class TierStats:
    """A tier's counters since start. ``failures`` counts reads and writes that were given up, by reason."""

    entries: int
    used_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    evictions: int
    dropped_puts: int
    failures: dict[str, int]


class StorageTier(ABC):
    """Holds KV by key. Every method is thread-safe; none raises for a failure of the medium (that is a miss)."""

    name: ClassVar[str]
    must_ask: ClassVar[bool] = False
    """Whether :meth:`contains` knows of the medium only what :meth:`ask` has found out."""

    @abstractmethod
    def contains(self, key: CacheKey) -> bool:
        """Whether :meth:`submit_get` has something to try. Touches only the index, never the medium."""

    def ask(self, keys: Sequence[CacheKey]) -> Future[None] | None:
        """Begin to find out, from the medium, which of ``keys`` are there; :meth:`contains` knows when the future is
        done. None where there is nothing to find out. The future never raises."""
        return None

    @abstractmethod
    def submit_put(self, key: CacheKey, obj: MemoryObj) -> bool:
        """Keep ``obj`` under ``key``. Takes its own reference; never blocks on the medium.

        False when the tier will not keep it (full of pinned entries, write queue full, broken): the caller loses
        nothing. A key that is already there is kept as it is and counts as True.
        """

    @abstractmethod
    def submit_get(self, key: CacheKey) -> Future[MemoryObj | None]:
        """Start reading. The future gives an object with one reference for the caller, or None for a miss
        (not there, checksum wrong, medium failed). It never raises."""

    @abstractmethod
    def remove(self, key: CacheKey) -> bool:
        """Forget ``key``; False when it was not there or is pinned."""

    @abstractmethod
    def pin(self, key: CacheKey) -> bool:
        """Forbid eviction of ``key`` until as many :meth:`unpin`. False when it is not there."""

    @abstractmethod
    def unpin(self, key: CacheKey) -> None:
        """Undo one :meth:`pin`. Unknown keys are ignored: the entry may be gone after :meth:`clear`."""

    @abstractmethod
    def keys(self) -> Sequence[CacheKey]:
        """A snapshot, coldest first as far as the policy knows."""

    @abstractmethod
    def clear(self) -> int:
        """Forget every entry that is not pinned or in flight; returns how many went."""

    @abstractmethod
    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every accepted put is done; False when ``timeout`` seconds were not enough."""

    @abstractmethod
    def stats(self) -> TierStats: ...

    @abstractmethod
    def close(self) -> None:
        """Finish or drop what is in flight, give back every reference and resource. Idempotent."""
