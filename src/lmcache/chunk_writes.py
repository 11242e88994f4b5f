"""Storing in two phases: chunks are allocated and filled, and only then seen by anybody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

from lmcache.keys import CacheKey, token_array
from lmcache.kv_ends import HostLayout, LayerKV, LayerSource, Parts
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.observability.events import CacheStoreEvent, EventBuffer
from lmcache.prompt import Chunk, Prompt
from lmcache.storage.kv_storage import KVStorage


class ChunkWrites:
    """The chunks that are being stored at this moment. Two stores of one chunk at once copy it once."""

    def __init__(self, storage: KVStorage, events: EventBuffer | None = None) -> None:
        """``events`` is told of each chunk that was stored."""
        self._storage = storage
        self._events = events
        self._lock = threading.Lock()
        self._under_way: set[CacheKey] = set()

    @contextmanager
    def prepare(
        self, chunks: Iterable[Chunk], spec: Callable[[int], KVSpec]
    ) -> Iterator[list[tuple[Chunk, MemoryObj]]]:
        """Memory for those of ``chunks`` that nobody holds or is storing; given back when the block is left.

        Ends at the first chunk that finds no memory: those behind it could not be found without it.
        """
        parts: list[tuple[Chunk, MemoryObj]] = []
        try:
            for chunk in chunks:
                if not self._claim(chunk.key):
                    continue
                obj = self._storage.allocate(spec(chunk.num_tokens))
                if obj is None:
                    self._disclaim(chunk.key)
                    break
                parts.append((chunk, obj))
            yield parts
        finally:
            for chunk, obj in parts:
                obj.ref_down()
                self._disclaim(chunk.key)

    def publish(self, prompt: Prompt, parts: Parts) -> int:
        """Make filled ``parts`` visible; how many tokens were kept."""
        stored = 0
        for chunk, obj in parts:
            if not self._storage.put(chunk.key, obj):
                break  # those behind it could not be found without it
            stored += chunk.num_tokens
            if self._events is not None:
                self._events.add(_event(prompt, chunk))
        self._storage.metrics.stored(stored)
        return stored

    def publish_each(self, parts: Parts) -> int:
        """Make filled ``parts`` visible that need none of the others to be found; how many tokens were kept."""
        stored = sum(chunk.num_tokens for chunk, obj in parts if self._storage.put(chunk.key, obj))
        self._storage.metrics.stored(stored)
        return stored

    def store_layers(
        self, prompt: Prompt, source: LayerSource, host: HostLayout
    ) -> Generator[int, LayerKV | None, int]:
        """See ``LMCacheEngine.store_layer``."""
        with self.prepare(prompt.wanted(), host.spec) as parts:
            for layer in range(host.num_layers):
                sent = yield layer
                source.gather_layer(layer, parts, sent)
            stored = self.publish(prompt, parts)
        yield host.num_layers
        return stored

    def _claim(self, key: CacheKey) -> bool:
        with self._lock:
            if key in self._under_way:
                return False
            self._under_way.add(key)
        # Looked at after the claim: whoever held it before has published.
        if self._storage.renew(key):
            self._disclaim(key)
            return False
        return True

    def _disclaim(self, key: CacheKey) -> None:
        with self._lock:
            self._under_way.discard(key)


def _event(prompt: Prompt, chunk: Chunk) -> CacheStoreEvent:
    index = chunk.start // prompt.chunk_size
    return CacheStoreEvent(
        block_hashes=[chunk.key.digest],
        parent_block_hash=prompt.chunks[index - 1].key.digest if index else None,
        token_ids=token_array(prompt.tokens[chunk.start : chunk.end]).tolist(),
        lora_id=None,
        block_size=prompt.chunk_size,
        medium="cpu",
    )
