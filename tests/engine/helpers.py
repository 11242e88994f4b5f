"""A small world to test engines in: a tiny model, KV that names its token, pages, and tiers that obey the test."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.config.schema import GIB
from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.interface import Allocate, StorageTier, TierStats
from lmcache.storage.tiered import TieredStorage

LAYERS, HEADS, DIM, CHUNK = 3, 2, 8, 16


def make_config(**overrides: Any) -> LMCacheEngineConfig:
    return LMCacheEngineConfig.from_defaults(**{"chunk_size": CHUNK, "max_local_cpu_size": 8 / 1024, **overrides})


def make_metadata(**overrides: Any) -> LMCacheEngineMetadata:
    shape = (LAYERS, 2, CHUNK, HEADS, DIM)
    return LMCacheEngineMetadata(**{"model_name": "tiny", "kv_dtype": torch.float32, "kv_shape": shape, **overrides})


def make_engine(
    slower: Sequence[StorageTier] = (),
    *,
    metadata: LMCacheEngineMetadata | None = None,
    connector: GPUConnectorInterface | None = None,
    **overrides: Any,
) -> LMCacheEngine:
    """An engine on memory and the given slower tiers."""
    config = make_config(**overrides)
    memory = LocalCPUTier(int(config.max_local_cpu_size * GIB), config.cache_policy)
    for tier in slower:
        if isinstance(tier, SlowTier):
            tier.allocate = memory.allocate
    storage = TieredStorage(memory, slower, keep_in_memory=config.local_cpu)
    return LMCacheEngine(config, metadata or make_metadata(), storage, connector)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 32000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def kv_of(tokens: Sequence[int], metadata: LMCacheEngineMetadata | None = None, salt: int = 0) -> torch.Tensor:
    """KV ``[L, planes, T, H, D]`` that only this prompt (under this salt) has: every number depends on the whole
    prefix up to its token."""
    metadata = metadata or make_metadata()
    layers, planes, _, heads, dim = metadata.kv_shape
    prefix = torch.tensor(list(tokens), dtype=torch.float64).add(salt + 1).cumsum(0).remainder(251)
    places = torch.arange(layers * planes * heads * dim, dtype=torch.float64).view(layers, planes, 1, heads, dim)
    return (prefix.view(1, 1, -1, 1, 1) + places).remainder(241).to(metadata.kv_dtype)


def per_layer(blob: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
    return tuple(layer.unbind(0) for layer in blob)


def leading(count: int, total: int, start: int = 0) -> torch.Tensor:
    """Bool ``[total]``, True for ``[start, count)``."""
    index = torch.arange(total)
    return (index >= start) & (index < count)


class PagesConnector(GPUConnectorInterface):
    """Pages ``[L, 2, slots, H, D]`` on the CPU; the host layout is the same, token by token."""

    def __init__(self, num_slots: int = 1024, layout: str = "test-pages-1") -> None:
        self.pages = torch.full((LAYERS, 2, num_slots, HEADS, DIM), -1.0)
        self._layout = layout

    @property
    def layout(self) -> str:
        return self._layout

    @property
    def num_layers(self) -> int:
        return LAYERS

    def spec(self, num_tokens: int) -> KVSpec:
        return KVSpec((LAYERS, 2, num_tokens, HEADS, DIM), torch.float32, self._layout, num_tokens)

    def batched_from_gpu(self, objs, ranges, slot_mapping):
        for layer in range(LAYERS):
            self.layer_from_gpu(layer, objs, ranges, slot_mapping)

    def batched_to_gpu(self, objs, ranges, slot_mapping):
        for layer in range(LAYERS):
            self.layer_to_gpu(layer, objs, ranges, slot_mapping)

    def layer_from_gpu(self, layer, objs, ranges, slot_mapping):
        for obj, (start, end) in zip(objs, ranges, strict=True):
            slots = slot_mapping[start:end]
            assert len(slots) == obj.spec.num_tokens
            assert bool((slots >= 0).all()), "a chunk with untouchable pages cannot be read"
            obj.tensor[layer].copy_(self.pages[layer][:, slots])

    def layer_to_gpu(self, layer, objs, ranges, slot_mapping):
        for obj, (start, end) in zip(objs, ranges, strict=True):
            slots = slot_mapping[start:end]
            assert len(slots) == obj.spec.num_tokens
            wanted = slots >= 0
            self.pages[layer][:, slots[wanted]] = obj.tensor[layer][:, wanted]


class SlowTier(StorageTier):
    """A dictionary whose reads end when the test says so (:meth:`answer`), unless ``hold_reads`` is off."""

    name = "slow"

    def __init__(self, allocate: Allocate | None = None, *, hold_reads: bool = True) -> None:
        self.allocate = allocate
        self.held: dict[CacheKey, tuple[KVSpec, torch.Tensor]] = {}
        self.reads: list[tuple[CacheKey, Future[MemoryObj | None]]] = []
        self.hold_reads = hold_reads

    def answer(self, *, failing: bool = False, index: int = 0) -> None:
        """End the read that is ``index``-th in line; with ``failing``, as a miss."""
        key, future = self.reads.pop(index)
        future.set_result(None if failing else self._read(key))

    def answer_all(self) -> None:
        while self.reads:
            self.answer()

    def _read(self, key):
        if key not in self.held:
            return None
        spec, payload = self.held[key]
        obj = self.allocate(spec)
        if obj is not None:
            obj.bytes.copy_(payload)
        return obj

    def contains(self, key):
        return key in self.held

    def submit_put(self, key, obj):
        self.held.setdefault(key, (obj.spec, obj.bytes.clone()))
        return True

    def submit_get(self, key):
        future: Future[MemoryObj | None] = Future()
        self.reads.append((key, future))
        if not self.hold_reads:
            self.answer_all()
        return future

    def remove(self, key):
        return self.held.pop(key, None) is not None

    def pin(self, key):
        return key in self.held

    def unpin(self, key):
        pass

    def keys(self):
        return list(self.held)

    def clear(self):
        count = len(self.held)
        self.held.clear()
        return count

    def flush(self, timeout=None):
        return True

    def stats(self):
        return TierStats(len(self.held), 0, 0, 0, 0, 0, 0, {})

    def close(self):
        self.answer_all()
        self.clear()


class BrokenTier(StorageTier):
    """Raises wherever it is touched, against its contract."""

    name = "broken"

    def _raise(self, *_: object) -> Any:
        raise OSError("broken")

    contains = submit_put = submit_get = remove = pin = unpin = keys = clear = flush = close = _raise

    def stats(self):
        return TierStats(0, 0, 0, 0, 0, 0, 0, {})
