"""``LMCacheEngine``: store, look up and retrieve the KV of token sequences."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import overload

import torch

from lmcache.config import LMCacheEngineConfig
from lmcache.filling import ChunkToFill, Filling
from lmcache.keys import Namespace, PrefixKey, Tokens, prefix_keys, token_array
from lmcache.lease import LeasedChunk, PrefixLease
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import TOKEN_MAJOR, LMCacheEngineMetadata
from lmcache.observability.events import CacheStoreEvent, EventBuffer
from lmcache.observability.metrics import Metrics
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.pinning import PinBook
from lmcache.storage.interface import TierStats
from lmcache.storage.tiered import TieredStorage
from lmcache.tensor_blob import KVLike, copy_tokens, in_format, token_major_views
from lmcache.token_mask import checked_slots, first_wanted


@dataclass(frozen=True)
class EngineStats:
    """Counters since start: tokens asked for, found by tier, newly stored; and each tier's own."""

    requested_tokens: int
    reused_tokens: dict[str, int]
    stored_tokens: int
    tiers: dict[str, TierStats]


class LMCacheEngine:
    """Exact prefix reuse: what comes back for a prefix is byte for byte what was stored for it.

    Two paths. On the *tensor path* KV is passed as tensors: a blob ``[L, 2, T, H, D]`` (``[L, 2, H, T, D]`` when
    ``metadata.fmt`` is "huggingface") or (k, v) per layer. On the *paged path*, chosen by passing ``slot_mapping``
    (int64 ``[T]``, −1 for tokens to leave alone), it moves between an engine's pages and host memory. The two keep
    different bytes for a chunk and so never share entries.

    ``mask`` (bool ``[T]``: a run of False, then of True) leaves out leading tokens: they are there already. ``lora``
    and ``cache_salt`` isolate adapters and tenants.

    A fault of a tier is a miss; only a caller's mistake raises (ValueError). Thread-safe.
    """

    def __init__(
        self,
        config: LMCacheEngineConfig,
        metadata: LMCacheEngineMetadata,
        storage: TieredStorage,
        gpu_connector: GPUConnectorInterface | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config = config
        self.metadata = metadata
        self.storage = storage
        self.gpu_connector = gpu_connector
        self.metrics = metrics or Metrics()
        self._events = EventBuffer()
        self._filling = Filling(storage, self.metrics)
        self._pins = PinBook(storage)

    def set_gpu_connector(self, connector: GPUConnectorInterface) -> None:
        """Say how KV moves to and from the engine's pages; integrations learn it after the engine exists."""
        self.gpu_connector = connector

    # Keys

    def namespace(self, *, paged: bool, lora: str = "", cache_salt: str = "") -> Namespace:
        return self.metadata.namespace(
            self._connector().layout if paged else TOKEN_MAJOR, lora=lora, cache_salt=cache_salt
        )

    def prefix_keys(
        self, tokens: Tokens, *, paged: bool = False, lora: str = "", cache_salt: str = ""
    ) -> list[PrefixKey]:
        """Keys of the chunks of ``tokens``; with ``save_unfull_chunk`` also of a last one that is not full."""
        return prefix_keys(
            self.namespace(paged=paged, lora=lora, cache_salt=cache_salt),
            tokens,
            self.config.chunk_size,
            include_partial=self.config.save_unfull_chunk,
        )

    # Looking up

    def lookup(self, tokens: Tokens, *, paged: bool = False, lora: str = "", cache_salt: str = "") -> int:
        """How many leading tokens could be reused now. Touches only indexes, holds nothing."""
        keys = self.prefix_keys(tokens, paged=paged, lora=lora, cache_salt=cache_salt)
        return self._usable(len(self.storage.locate(keys)), len(tokens))

    def contains(self, tokens: Tokens, *, paged: bool = False, lora: str = "", cache_salt: str = "") -> bool:
        """Whether every chunk of ``tokens`` is held (a last chunk that is not full counts with
        ``save_unfull_chunk``)."""
        keys = self.prefix_keys(tokens, paged=paged, lora=lora, cache_salt=cache_salt)
        return bool(keys) and len(self.storage.locate(keys)) == len(keys)

    def prefetch(
        self,
        tokens: Tokens,
        *,
        paged: bool = False,
        lora: str = "",
        cache_salt: str = "",
        keys: Sequence[PrefixKey] | None = None,
    ) -> PrefixLease:
        """Hold what can be reused and start reading what lies in slower tiers. Never blocks.

        ``keys`` saves hashing when the caller has them from :meth:`prefix_keys`.
        """
        if keys is None:
            keys = self.prefix_keys(tokens, paged=paged, lora=lora, cache_salt=cache_salt)
        tiers = self.storage.locate(keys)
        count = self._usable(len(tiers), len(tokens))
        self.metrics.requested(len(tokens))
        return PrefixLease(
            [
                LeasedChunk(start, end, tier.name, self.storage.fetch(key, tier))
                for key, tier, (start, end) in zip(keys, tiers, self._ranges(count), strict=False)
            ]
        )

    # Retrieving

    @overload
    def retrieve(
        self, tokens: Tokens, mask: torch.Tensor | None = ..., return_tuple: bool = ..., *, slot_mapping: None = ...,
        lora: str = ..., cache_salt: str = ..., lease: PrefixLease | None = ...,
    ) -> tuple[KVLike, torch.Tensor]: ...  # fmt: skip

    @overload
    def retrieve(
        self, tokens: Tokens, mask: torch.Tensor | None = ..., return_tuple: bool = ..., *, slot_mapping: torch.Tensor,
        lora: str = ..., cache_salt: str = ..., lease: PrefixLease | None = ...,
    ) -> torch.Tensor: ...  # fmt: skip

    def retrieve(
        self,
        tokens: Tokens,
        mask: torch.Tensor | None = None,
        return_tuple: bool = True,
        *,
        slot_mapping: torch.Tensor | None = None,
        lora: str = "",
        cache_salt: str = "",
        lease: PrefixLease | None = None,
    ) -> tuple[KVLike, torch.Tensor] | torch.Tensor:
        """The KV of the longest stored prefix of ``tokens``.

        Args:
            lease: from :meth:`prefetch` of the same tokens; stays the caller's. Without one, one is taken and released.

        Returns:
            Tensor path: ``(kv, found)``. ``found`` is bool ``[T]`` on the CPU; ``kv`` covers the True tokens: (k, v)
            per layer with ``return_tuple``, else a blob; ``()`` when there are none.
            Paged path: ``found`` alone; the pages of the True tokens are written.
        """
        first = first_wanted(mask, len(tokens))
        paged = slot_mapping is not None
        with self._leased(lease, tokens, paged, lora, cache_salt) as held, self.metrics.timed("retrieve"):
            chunks = _wanted_chunks(held, first, len(tokens))
            found = self._found(chunks, first, len(tokens))
            if slot_mapping is not None:
                objs, ranges = _objects_and_ranges(chunks)
                self._connector().batched_to_gpu(objs, ranges, checked_slots(slot_mapping, len(tokens)))
                return found
            if not chunks:
                return (), found
            return in_format(self._gather(chunks, first), self.metadata, return_tuple), found

    def retrieve_layer(
        self,
        tokens: Tokens,
        mask: torch.Tensor | None = None,
        *,
        slot_mapping: torch.Tensor | None = None,
        lora: str = "",
        cache_salt: str = "",
        lease: PrefixLease | None = None,
    ) -> Generator[tuple[torch.Tensor, torch.Tensor] | None, None, torch.Tensor]:
        """:meth:`retrieve`, a layer a step.

        Yields once a layer, in order, when it is in place: on the tensor path (k, v) of the found tokens,
        ``[T', H, D]`` (``[H, T', D]`` for "huggingface"), on the paged path None. Returns ``found``. Closing it early
        is fine.
        """
        first = first_wanted(mask, len(tokens))
        with self._leased(lease, tokens, slot_mapping is not None, lora, cache_salt) as held:
            chunks = _wanted_chunks(held, first, len(tokens))
            found = self._found(chunks, first, len(tokens))
            if slot_mapping is not None:
                slots = checked_slots(slot_mapping, len(tokens))
                objs, ranges = _objects_and_ranges(chunks)
                connector = self._connector()
                for layer in range(connector.num_layers):
                    connector.layer_to_gpu(layer, objs, ranges, slots)
                    yield None
            elif chunks:
                for layer in range(self.metadata.num_layers):
                    blob = self._gather(chunks, first, slice(layer, layer + 1))
                    shaped = in_format(blob, self.metadata, False)
                    assert isinstance(shaped, torch.Tensor)
                    yield shaped[0, 0], shaped[0, -1]
            return found

    # Storing

    def store(
        self,
        tokens: Tokens,
        kv: KVLike | None = None,
        mask: torch.Tensor | None = None,
        *,
        slot_mapping: torch.Tensor | None = None,
        lora: str = "",
        cache_salt: str = "",
        keys: Sequence[PrefixKey] | None = None,
    ) -> int:
        """Keep the KV of the chunks of ``tokens`` that are not held yet; returns how many tokens that were.

        Pass ``kv`` on the tensor path, ``slot_mapping`` on the paged path. Chunks that begin before the first True of
        ``mask`` are left out. Writing to slower tiers goes on behind the caller's back.
        """
        views = None if kv is None else token_major_views(kv, len(tokens), self.metadata)
        if (views is None) == (slot_mapping is None):
            raise ValueError("store takes either kv (tensor path) or slot_mapping (paged path)")
        with self.metrics.timed("store"):
            chunks = self._prepare(tokens, mask, slot_mapping is not None, lora, cache_salt, keys)
            try:
                if views is not None:
                    for chunk in chunks:
                        copy_tokens(views, chunk.start, chunk.end, chunk.obj.tensor)
                elif slot_mapping is not None and chunks:
                    slots = checked_slots(slot_mapping, len(tokens))
                    objs, ranges = [c.obj for c in chunks], [(c.start, c.end) for c in chunks]
                    self._connector().batched_from_gpu(objs, ranges, slots)
            except BaseException:
                self._filling.discard(chunks)
                raise
            return self._publish(chunks, tokens)

    def store_layer(
        self,
        tokens: Tokens,
        mask: torch.Tensor | None = None,
        *,
        slot_mapping: torch.Tensor | None = None,
        lora: str = "",
        cache_salt: str = "",
        keys: Sequence[PrefixKey] | None = None,
    ) -> Generator[int, tuple[torch.Tensor, torch.Tensor] | None, int]:
        """:meth:`store`, a layer a step.

        Yields the number of the layer that it wants next. On the paged path go on when that layer's pages are written;
        on the tensor path ``send`` its (k, v), ``[T, H, D]`` (``[H, T, D]`` for "huggingface"). Returns the number of
        tokens stored. Nothing is visible before the last layer; closing it early leaves nothing behind.
        """
        slots = None if slot_mapping is None else checked_slots(slot_mapping, len(tokens))
        chunks = self._prepare(tokens, mask, slots is not None, lora, cache_salt, keys)
        objs, ranges = [chunk.obj for chunk in chunks], [(chunk.start, chunk.end) for chunk in chunks]
        num_layers = self.metadata.num_layers if slots is None else self._connector().num_layers
        one_layer = replace(self.metadata, kv_shape=(1, *self.metadata.kv_shape[1:]))
        try:
            for layer in range(num_layers):
                pair = yield layer
                if slots is not None:
                    self._connector().layer_from_gpu(layer, objs, ranges, slots)
                    continue
                if pair is None:
                    raise ValueError(f"store_layer without slot_mapping: send (k, v) of layer {layer}")
                views = token_major_views([pair], len(tokens), one_layer)
                for chunk in chunks:
                    copy_tokens(views, chunk.start, chunk.end, chunk.obj.tensor[layer : layer + 1])
        except BaseException:
            self._filling.discard(chunks)
            raise
        return self._publish(chunks, tokens)

    # Keeping and forgetting

    def pin(self, tokens: Tokens, *, paged: bool = False, lora: str = "", cache_salt: str = "") -> int:
        """Forbid eviction of what is held of ``tokens`` until :meth:`unpin`; returns how many leading tokens."""
        keys = self.prefix_keys(tokens, paged=paged, lora=lora, cache_salt=cache_salt)
        return min(self._pins.pin(keys) * self.config.chunk_size, len(tokens))

    def unpin(self, tokens: Tokens, *, paged: bool = False, lora: str = "", cache_salt: str = "") -> None:
        """Undo one :meth:`pin` of the same tokens."""
        self._pins.unpin(self.prefix_keys(tokens, paged=paged, lora=lora, cache_salt=cache_salt))

    def clear(self) -> int:
        """Forget every chunk that is neither pinned nor in use; returns how many went."""
        return self.storage.clear()

    def stats(self) -> EngineStats:
        counted = self.metrics.snapshot()
        reused = {tier.name: f'lmcache_reused_tokens_total{{tier="{tier.name}"}}' for tier in self.storage.tiers}
        return EngineStats(
            requested_tokens=int(counted["lmcache_requested_tokens_total"]),
            reused_tokens={name: int(counted.get(sample, 0)) for name, sample in reused.items()},
            stored_tokens=int(counted["lmcache_stored_tokens_total"]),
            tiers=self.storage.stats(),
        )

    def take_events(self) -> list[CacheStoreEvent]:
        """What was stored since the last call (only with ``enable_kv_events``)."""
        return self._events.take()

    def close(self) -> None:
        """Write what waits to be written, give everything back. Idempotent."""
        self._pins.clear()
        self.storage.close()

    # Parts

    def _connector(self) -> GPUConnectorInterface:
        if self.gpu_connector is None:
            raise ValueError("the paged path needs a gpu_connector; set one, or pass kv instead of slot_mapping")
        return self.gpu_connector

    @contextmanager
    def _leased(
        self, lease: PrefixLease | None, tokens: Tokens, paged: bool, lora: str, cache_salt: str
    ) -> Iterator[PrefixLease]:
        if lease is not None:
            yield lease
            return
        with self.prefetch(tokens, paged=paged, lora=lora, cache_salt=cache_salt) as own:
            yield own

    def _ranges(self, num_tokens: int) -> list[tuple[int, int]]:
        size = self.config.chunk_size
        return [(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]

    def _usable(self, num_chunks: int, num_tokens: int) -> int:
        """Tokens in ``num_chunks`` leading chunks, 0 when that is less than ``min_retrieve_tokens``."""
        tokens = min(num_chunks * self.config.chunk_size, num_tokens)
        return tokens if tokens >= self.config.min_retrieve_tokens else 0

    def _found(self, chunks: Sequence[tuple[LeasedChunk, MemoryObj]], first: int, num_tokens: int) -> torch.Tensor:
        """The mask of what ``chunks`` cover from ``first`` on; counts it as reused."""
        found = torch.zeros(num_tokens, dtype=torch.bool)
        for chunk, _ in chunks:
            start = max(chunk.start, first)
            found[start : chunk.end] = True
            self.metrics.reused(chunk.tier, chunk.end - start)
        return found

    def _gather(
        self, chunks: Sequence[tuple[LeasedChunk, MemoryObj]], first: int, layers: slice = slice(None)
    ) -> torch.Tensor:
        """One blob ``[L, planes, T', H, D]`` of the tokens from ``first`` to the end of ``chunks``."""
        shape = list(chunks[0][1].tensor[layers].shape)
        shape[2] = chunks[-1][0].end - first
        blob = torch.empty(shape, dtype=self.metadata.kv_dtype)
        for chunk, obj in chunks:
            start = max(chunk.start, first)
            blob[:, :, start - first : chunk.end - first] = obj.tensor[layers, :, start - chunk.start :]
        return blob

    def _spec(self, paged: bool, num_tokens: int) -> KVSpec:
        if paged:
            return self._connector().spec(num_tokens)
        layers, planes, _, heads, dim = self.metadata.kv_shape
        return KVSpec((layers, planes, num_tokens, heads, dim), self.metadata.kv_dtype, TOKEN_MAJOR, num_tokens)

    def _prepare(
        self,
        tokens: Tokens,
        mask: torch.Tensor | None,
        paged: bool,
        lora: str,
        cache_salt: str,
        keys: Sequence[PrefixKey] | None,
    ) -> list[ChunkToFill]:
        first = first_wanted(mask, len(tokens))
        if keys is None:
            keys = self.prefix_keys(tokens, paged=paged, lora=lora, cache_salt=cache_salt)
        ranges = self._ranges(len(tokens))
        return self._filling.prepare(
            (
                (key, parent, start, end)
                for key, parent, (start, end) in zip(keys, (None, *keys), ranges, strict=False)
                if start >= first
            ),
            partial(self._spec, paged),
        )

    def _publish(self, chunks: Sequence[ChunkToFill], tokens: Tokens) -> int:
        kept = self._filling.publish(chunks)
        stored = sum(chunk.end - chunk.start for chunk in kept)
        self.metrics.stored(stored)
        if self.config.enable_kv_events and kept:
            ids = token_array(tokens)
            for chunk in kept:
                self._events.add(
                    CacheStoreEvent(
                        block_hashes=[chunk.key.digest],
                        parent_block_hash=chunk.parent.digest if chunk.parent is not None else None,
                        token_ids=ids[chunk.start : chunk.end].tolist(),
                        lora_id=None,
                        block_size=self.config.chunk_size,
                        medium="cpu",
                    )
                )
        return stored


def _wanted_chunks(lease: PrefixLease, first: int, num_tokens: int) -> list[tuple[LeasedChunk, MemoryObj]]:
    """The chunks of ``lease`` that hold tokens from ``first`` on, within ``num_tokens``."""
    return [(chunk, obj) for chunk, obj in lease.arrived() if first < chunk.end <= num_tokens]


def _objects_and_ranges(
    chunks: Sequence[tuple[LeasedChunk, MemoryObj]],
) -> tuple[list[MemoryObj], list[tuple[int, int]]]:
    return [obj for _, obj in chunks], [(chunk.start, chunk.end) for chunk, _ in chunks]
