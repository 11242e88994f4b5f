"""Finds references to KV that a test forgot to give back."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from lmcache.keys import CacheKey
from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import MemoryObj
from lmcache.storage.cpu import LocalCPUTier


class LeakDetector:
    """Knows every pool and memory tier that was built since :meth:`install`.

    The only reference to an object that may outlast a test is the one by which a memory tier that is still open keeps
    an entry, and that entry must not be pinned.
    """

    def __init__(self) -> None:
        self._pools: WeakSet[SlabAllocator] = WeakSet()
        self._tiers: WeakKeyDictionary[SlabAllocator, ref[LocalCPUTier]] = WeakKeyDictionary()
        # A pool and its objects refer to each other: without this the garbage collector could hide a leak.
        self._new: list[object] = []

    def install(self) -> None:
        _after_init(SlabAllocator, self._watch_pool)
        _after_init(LocalCPUTier, self._watch_tier)

    def leaks(self, patience: float = 5.0) -> list[str]:
        """A line for each leak. Work in the background gets ``patience`` seconds to give back what it holds.

        What was reported once is not reported again: the next test is not to blame.
        """
        deadline = time.monotonic() + patience
        while (found := self._look()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if found:
            self._pools.clear()
        self._new.clear()
        return found

    def _look(self) -> list[str]:
        return [line for pool in list(self._pools) for line in self._look_at(pool)]

    def _look_at(self, pool: SlabAllocator) -> list[str]:
        entries: list[MemoryObj] = []
        pins: list[tuple[CacheKey, int]] = []
        if pool in self._tiers:
            tier = self._tiers[pool]()
            if tier is None:  # nobody refers to tier or pool any more: garbage that was not collected yet
                return []
            entries = list(tier._entries.values())
            pins = list(tier._pins.items())
        held = set(map(id, entries))
        found = [
            f"{obj!r} at granule {obj.offset}: {_explain(obj, id(obj) in held)}"
            for obj in pool.live_objects()
            if id(obj) not in held or obj.ref_count != 1
        ]
        return found + [f"{key!r} is still pinned {count} times" for key, count in pins]

    def _watch_pool(self, pool: SlabAllocator) -> None:
        self._pools.add(pool)
        self._new.append(pool)

    def _watch_tier(self, tier: LocalCPUTier) -> None:
        self._tiers[tier.pool] = ref(tier)
        self._new.append(tier)


def _explain(obj: MemoryObj, held: bool) -> str:
    if held:
        return f"{obj.ref_count - 1} references besides that of its tier were not given back"
    return f"{obj.ref_count} references were not given back and no tier holds it"


def _after_init(cls: type[Any], watch: Callable[[Any], None]) -> None:
    init = cls.__init__

    @functools.wraps(init)
    def watched_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        watch(self)

    cls.__init__ = watched_init
