"""Which KV became available: what cache-aware routers listen to."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStoreEvent:
    """One chunk was stored. The fields are those of vLLM's ``BlockStored``; hashes are the keys' digests."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    lora_id: int | None
    block_size: int
    medium: str


class EventBuffer:
    """Keeps the newest ``capacity`` events until somebody takes them; ``dropped`` counts those lost.

    An event of 256 tokens weighs about 10 kB, so the default never holds much more than 100 MB.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self._events: deque[CacheStoreEvent] = deque(maxlen=capacity)
        self._lock = threading.Lock()
        self.dropped = 0

    def add(self, event: CacheStoreEvent) -> None:
        with self._lock:
            self.dropped += len(self._events) == self._events.maxlen
            self._events.append(event)

    def take(self) -> list[CacheStoreEvent]:
        """Every event since the last call, oldest first."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events
