"""Chunks that engines with another number of tensor-parallel ranks have kept, cut or joined to this rank's heads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch

from lmcache.keys import CacheKey, Shard
from lmcache.memory.memory_obj import MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.interface import Allocate, StorageTier, TierStats


class ShardSource(NamedTuple):
    """A tier that may hold chunks of ``shard``. Several sources may have one tier in common."""

    shard: Shard
    tier: StorageTier


@dataclass(frozen=True)
class _Recipe:
    """Our chunk is the chunks of ``sources`` side by side, from share ``first`` of ``shares`` equal shares of that on.

    One source and several shares: it is cut. One share: the sources are joined.
    """

    sources: tuple[ShardSource, ...]
    first: int
    shares: int

    def holds(self, own: Shard, key: CacheKey) -> bool:
        return all(source.tier.contains(key.moved(own, source.shard)) for source in self.sources)


def recipes(own: Shard, sources: Sequence[ShardSource]) -> list[_Recipe]:
    """The ways to make chunks of ``own`` out of those of ``sources``, those with the fewest reads first.

    Only sizes of which one divides the other go together. Equal shards too may lie elsewhere: where ranks share heads.
    """
    found: list[_Recipe] = []
    stage = (own.pp_rank, own.pp_size)
    by_size: dict[int, dict[int, ShardSource]] = {}
    for source in sources:
        if (source.shard.pp_rank, source.shard.pp_size) == stage:
            by_size.setdefault(source.shard.tp_size, {})[source.shard.tp_rank] = source
    for size, ranks in sorted(by_size.items()):
        if own.tp_size % size == 0:
            shares = own.tp_size // size
            source_rank, first = divmod(own.tp_rank, shares)
            wanted = [source_rank]
        elif size % own.tp_size == 0:
            parts = size // own.tp_size
            wanted, first, shares = [own.tp_rank * parts + part for part in range(parts)], 0, 1
        else:
            continue
        if all(rank in ranks for rank in wanted):
            found.append(_Recipe(tuple(ranks[rank] for rank in wanted), first, shares))
    return found


class ReshardedTier(StorageTier):
    """Reads token-major chunks of other shards out of other tiers, which it closes. Takes none itself.

    A chunk that is not token-major, or of another shape than its shard's, is a miss.
    """

    name: ClassVar[str] = "resharded"

    def __init__(self, own: Shard, sources: Sequence[ShardSource], allocate: Allocate) -> None:
        """Args:
        own: the shard whose keys are asked for.
        allocate: gives the host memory for what is made.
        """
        self._own = own
        self._recipes = recipes(own, sources)
        self._tiers = tuple({id(source.tier): source.tier for source in sources}.values())
        self._allocate = allocate
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def contains(self, key: CacheKey) -> bool:
        return any(recipe.holds(self._own, key) for recipe in self._recipes)

    def submit_put(self, key: CacheKey, obj: MemoryObj) -> bool:
        return False

    def submit_get(self, key: CacheKey) -> Future[MemoryObj | None]:
        made: Future[MemoryObj | None] = Future()
        made.set_running_or_notify_cancel()
        recipe = next((recipe for recipe in self._recipes if recipe.holds(self._own, key)), None)
        if recipe is None:
            self._finish(made, None)
            return made
        reads = [source.tier.submit_get(key.moved(self._own, source.shard)) for source in recipe.sources]
        left = _CountDown(len(reads))
        for read in reads:
            read.add_done_callback(partial(self._arrived, recipe, reads, left, made))
        return made

    def _arrived(
        self,
        recipe: _Recipe,
        reads: Sequence[Future[MemoryObj | None]],
        left: _CountDown,
        made: Future[MemoryObj | None],
        _: Future[MemoryObj | None],
    ) -> None:
        if not left.last():
            return
        objs = [read.result() for read in reads]
        try:
            obj = self._assemble(recipe, [obj for obj in objs if obj is not None])
        except Exception:  # memory that is not to be had, whatever `allocate` raises: a miss
            obj = None
        finally:
            for part in objs:
                if part is not None:
                    part.ref_down()
        self._finish(made, obj)

    def _assemble(self, recipe: _Recipe, objs: Sequence[MemoryObj]) -> MemoryObj | None:
        if len(objs) != len(recipe.sources) or not _alike(objs):
            return None
        spec = objs[0].spec
        layers, planes, num_tokens, heads, dim = spec.shape
        if heads % recipe.shares:
            return None
        shape = (layers, planes, num_tokens, heads * len(objs) // recipe.shares, dim)
        made = self._allocate(replace(spec, shape=shape))
        if made is None:
            return None
        target = made.tensor
        if recipe.shares > 1:
            width = heads // recipe.shares
            target.copy_(objs[0].tensor[:, :, :, recipe.first * width : (recipe.first + 1) * width])
        else:
            torch.cat([obj.tensor for obj in objs], dim=3, out=target)
        return made

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
        failures: dict[str, int] = {}
        for stats in inner:
            for reason, number in stats.failures.items():
                failures[reason] = failures.get(reason, 0) + number
        return TierStats(
            entries=sum(stats.entries for stats in inner),
            used_bytes=sum(stats.used_bytes for stats in inner),
            capacity_bytes=sum(stats.capacity_bytes for stats in inner),
            hits=self._hits,
            misses=self._misses,
            evictions=0,
            dropped_puts=0,
            failures=failures,
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
