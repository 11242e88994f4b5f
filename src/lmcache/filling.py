"""Storing in two phases: chunks are allocated, filled, and only then seen by anybody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lmcache.keys import PrefixKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.observability.metrics import Metrics
from lmcache.storage.tiered import TieredStorage


@dataclass(frozen=True)
class ChunkToFill:
    """Tokens ``[start, end)`` of a prompt, and the memory that waits for their KV. ``parent`` is the chunk before."""

    key: PrefixKey
    parent: PrefixKey | None
    start: int
    end: int
    obj: MemoryObj


class Filling:
    """Hands out chunks to fill and publishes those that were filled. Two stores of one chunk copy it once."""

    def __init__(self, storage: TieredStorage, metrics: Metrics) -> None:
        self._storage = storage
        self._metrics = metrics
        self._lock = threading.Lock()
        self._under_way: set[PrefixKey] = set()

    def prepare(
        self, chunks: Iterable[tuple[PrefixKey, PrefixKey | None, int, int]], spec: Callable[[int], KVSpec]
    ) -> list[ChunkToFill]:
        """Memory for each of ``(key, parent, start, end)`` that is neither held nor being filled by somebody else.

        Stops at the first that finds no memory: a later chunk without it could not be found.
        """
        prepared: list[ChunkToFill] = []
        for key, parent, start, end in chunks:
            if self._storage.contains(key):
                continue
            with self._lock:
                if key in self._under_way:
                    continue
                self._under_way.add(key)
            obj = self._storage.allocate(spec(end - start))
            if obj is None:
                self._finish(key)
                self._metrics.dropped(self._storage.memory.name)
                break
            prepared.append(ChunkToFill(key, parent, start, end, obj))
        return prepared

    def publish(self, chunks: Sequence[ChunkToFill]) -> list[ChunkToFill]:
        """Make filled chunks visible; those that some tier took."""
        kept = []
        for chunk in chunks:
            with chunk.obj as obj:
                if self._storage.put(chunk.key, obj):
                    kept.append(chunk)
            self._finish(chunk.key)
        return kept

    def discard(self, chunks: Sequence[ChunkToFill]) -> None:
        """Give up chunks that were not filled."""
        for chunk in chunks:
            chunk.obj.ref_down()
            self._finish(chunk.key)

    def _finish(self, key: PrefixKey) -> None:
        with self._lock:
            self._under_way.discard(key)
