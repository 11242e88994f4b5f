"""Chunks that engines with another number of tensor-parallel ranks have kept, cut or joined to this rank's heads."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch

from lmcache.keys import CacheKey, Shard
from lmcache.memory.memory_obj import MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.observability.logging import init_logger, log_limited
from lmcache.storage.interface import Allocate, StorageTier, TierStats
from lmcache.storage.shard_recipes import Recipe, recipes

logger = init_logger(__name__)


class ShardSource(NamedTuple):
    """A tier that may hold chunks of ``shard``. Several sources may have one tier in common."""

    shard: Shard
    tier: StorageTier


class _Way(NamedTuple):
    """A recipe, and for each of its shards who holds the chunks."""

    recipe: Recipe
    tiers: tuple[StorageTier, ...]

    def holds(self, key: CacheKey) -> bool:
        return all(tier.contains(part) for tier, part in zip(self.tiers, self.recipe.parts(key), strict=True))


def _ways(own: Shard, sources: Sequence[ShardSource]) -> list[_Way]:
    tiers = dict(sources)
    return [_Way(recipe, tuple(tiers[shard] for shard in recipe.shards)) for recipe in recipes(own, tiers)]


class ReshardedTier(StorageTier):
    """Reads token-major chunks of other shards out of other tiers, which it closes. Takes none itself.

    A chunk that is not token-major, or of another shape than its shard's, is a miss.
    """

    name: ClassVar[str] = "resharded"

    def __init__(
        self, own: Shard, sources: Sequence[ShardSource], allocate: Allocate, *, shared: Sequence[ShardSource] = ()
    ) -> None:
        """Args:
        own: the shard whose keys are asked for.
        allocate: gives the host memory for what is made.
        shared: sources that are looked in after ``sources``, and that somebody else clears, counts and closes.
        """
        self._ways = _ways(own, sources) + _ways(own, shared)
        self._tiers = tuple({id(source.tier): source.tier for source in sources}.values())
        self._allocate = allocate
        self._lock = threading.Lock()
        self._hits = self._misses = 0
        self._failures: Counter[str] = Counter()

    def contains(self, key: CacheKey) -> bool:
        return any(way.holds(key) for way in self._ways)

    def submit_put(self, key: CacheKey, obj: MemoryObj) -> bool:
        return False

    def submit_get(self, key: CacheKey) -> Future[MemoryObj | None]:
        made: Future[MemoryObj | None] = Future()
        made.set_running_or_notify_cancel()
        way = next((way for way in self._ways if way.holds(key)), None)
        if way is None:
            self._finish(made, None)
            return made
        reads = [tier.submit_get(part) for tier, part in zip(way.tiers, way.recipe.parts(key), strict=True)]
        left = _CountDown(len(reads))
        for read in reads:
            read.add_done_callback(partial(self._arrived, way.recipe, reads, left, made))
        return made

    def _arrived(
        self,
        recipe: Recipe,
        reads: Sequence[Future[MemoryObj | None]],
        left: _CountDown,
        made: Future[MemoryObj | None],
        _: Future[MemoryObj | None],
    ) -> None:
        if not left.last():
            return
        objs = [read.result() for read in reads]
        parts = [obj for obj in objs if obj is not None]
        made_of: MemoryObj | None = None
        try:
            # A part that did not come was counted, and said, by the tier that did not give it.
            if len(parts) == len(objs):
                made_of = self._assemble(recipe, parts)
        except Exception as error:  # memory that is not to be had, whatever `allocate` raises: a miss
            self._fail("internal", repr(error))
        finally:
            for part in parts:
                part.ref_down()
        self._finish(made, made_of)

    def _assemble(self, recipe: Recipe, parts: Sequence[MemoryObj]) -> MemoryObj | None:
        spec = parts[0].spec
        if not _alike(parts) or spec.shape[3] % recipe.shares:
            self._fail("unlike", f"chunks of {[part.spec for part in parts]} do not go together")
            return None
        layers, planes, num_tokens, heads, dim = spec.shape
        shape = (layers, planes, num_tokens, heads * len(parts) // recipe.shares, dim)
        made = self._allocate(replace(spec, shape=shape))
        if made is None:
            self._fail("no_memory", f"no host memory for {shape}")
            return None
        target = made.tensor
        if recipe.shares > 1:
            width = heads // recipe.shares
            target.copy_(parts[0].tensor[:, :, :, recipe.first * width : (recipe.first + 1) * width])
        else:
            torch.cat([part.tensor for part in parts], dim=3, out=target)
        return made

    def _fail(self, reason: str, detail: str) -> None:
        with self._lock:
            self._failures[f"read_{reason}"] += 1
        log_limited(logger, logging.WARNING, f"resharded:{reason}", "a chunk of other ranks is a miss: %s", detail)

    def _finish(self, made: Future[MemoryObj | None], obj: MemoryObj | None) -> None:
        with self._lock:
            self._hits += obj is not None
            self._misses += obj is None
        made.set_result(obj)

    def remove(self, key: CacheKey) -> bool:
        return False

    def pin(self, key: CacheKey) -> bool:
        return False

    def unpin(self, key: CacheKey) -> None:
        pass

    def keys(self) -> Sequence[CacheKey]:
        return []

    def clear(self) -> int:
        return sum(tier.clear() for tier in self._tiers)

    def flush(self, timeout: float | None = None) -> bool:
        return True

    def stats(self) -> TierStats:
        inner = [tier.stats() for tier in self._tiers]
        with self._lock:
            failures = Counter(self._failures)
        for stats in inner:
            failures.update(stats.failures)
        return TierStats(
            entries=sum(stats.entries for stats in inner),
            used_bytes=sum(stats.used_bytes for stats in inner),
            capacity_bytes=sum(stats.capacity_bytes for stats in inner),
            hits=self._hits,
            misses=self._misses,
            evictions=0,
            dropped_puts=0,
            failures=dict(failures),
        )

    def close(self) -> None:
        for tier in self._tiers:
            tier.close()


class _CountDown:
    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()

    def last(self) -> bool:
        """Whether this is the last of the calls that were announced."""
        with self._lock:
            self._count -= 1
            return self._count == 0


def _alike(objs: Sequence[MemoryObj]) -> bool:
    first = objs[0].spec
    return first.layout == TOKEN_MAJOR and len(first.shape) == 5 and all(obj.spec == first for obj in objs)
