"""SGLang's HiCache on our tiers: ``--hicache-storage-backend dynamic``.

::

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "lmcache", "interface_v1": 1,
        "module_path": "lmcache.integration.sglang.hicache_storage", "class_name": "LMCacheHiCacheStorage",
        "lmcache.local_disk": "/fast/disk"}'

SGLang keeps its own host memory and asks for single pages by their hash, which stands for all tokens before them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.util import Finalize
from typing import Any

import torch
from blake3 import blake3
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, PoolTransferResult

from lmcache.config import LMCacheEngineConfig
from lmcache.integration.guard import never_raise
from lmcache.integration.sglang.hicache_identity import page_namespace, rank_directory
from lmcache.keys import Namespace, PrefixKey
from lmcache.lease import PrefixLease
from lmcache.manager import LMCacheManager
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.observability.logging import configure_for_engine
from lmcache.observability.metrics import Metrics
from lmcache.prompt import Chunk

LAYOUT = "hicache-page-1"
"""One page as SGLang flattens it; what arrangement that is belongs to the keys."""


class LMCacheHiCacheStorage(HiCacheStorage):
    """Pages in host memory and on disk. No method raises; a page that cannot be had is a miss. Thread-safe."""

    def __init__(self, storage_config: HiCacheStorageConfig, _options: dict[str, Any] | None = None) -> None:
        """Args:
        storage_config: of this rank; ``extra_config["lmcache.<key>"]`` overrides our settings.

        Raises:
            ValueError: a setting is wrong (names the key, the value and where it came from).
        """
        configure_for_engine()
        config = rank_directory(
            LMCacheEngineConfig.load(engine_overrides=storage_config.extra_config or {}), storage_config
        )
        self._storage_config = storage_config
        # Only its tiers are used.
        metadata = LMCacheEngineMetadata("hicache", kv_shape=(1, 2, config.chunk_size, 1, 1))
        self._manager = LMCacheManager(config, metadata)
        self._storage = self._manager.storage
        self._pool: Any = None
        self._namespace: Namespace | None = None
        self._finalize = Finalize(self, self._manager.close, exitpriority=0)

    @property
    def metrics(self) -> Metrics:
        return self._manager.metrics

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Learn what a page is. Until then every call is a miss."""
        page = mem_pool_host.get_dummy_flat_data_page()
        self._page_dtype = page.dtype
        self._page_spec = KVSpec((page.nbytes,), torch.uint8, LAYOUT, mem_pool_host.page_size)
        self._pool = mem_pool_host
        self._namespace = replace(
            page_namespace(self._storage_config, mem_pool_host), codec=self._manager.config.inexact_codec
        )

    def on_host_pools_registered(self) -> None:
        """Raises:
        ValueError: the model has more than one kind of KV; SGLang then refuses to attach this backend.
        """
        others = [str(name) for name in getattr(self, "registered_pools", {}) if str(name) != "kv"]
        if others:
            raise ValueError(
                f"LMCacheHiCacheStorage keeps the KV of full attention only, but this model also has {others}; "
                "use --hicache-storage-backend file"
            )

    @never_raise(lambda: False)
    def exists(self, key: str) -> bool:
        return self._storage.contains(self._key(key))

    @never_raise(lambda: 0)
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many of ``keys``, from the first on, are all there."""
        return len(self._storage.find([self._key(key) for key in keys]))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        """``target_location``, filled; None for a miss, or when there is no target."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Fill ``target_locations``, whole pages, with the pages of ``keys``: those that were, and None for the first
        miss and everything behind it."""
        targets = list(target_locations or [None] * len(keys))
        filled = self._fill(keys, targets)
        return [target if index < filled else None for index, target in enumerate(targets)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Keep ``value``, one page; False when no tier will have it."""
        return self.batch_set([key], [value])

    @never_raise(lambda: False)
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Keep ``values``, one page each; False when one of them was not kept."""
        return all(self._put(key, page) for key, page in zip(keys, values, strict=True))

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Fill the pages of SGLang's host pool at ``host_indices`` (one a token); which were filled."""
        filled = self._fill_pool(keys, host_indices)
        return [index < filled for index in range(len(keys))]

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Keep the pages of SGLang's host pool at ``host_indices`` (one a token); which were kept."""
        kept = self._put_from_pool(keys, host_indices)
        return [index < kept for index in range(len(keys))]

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """Nothing is ever there for a request that also needs another kind of KV (see
        :meth:`on_host_pools_registered`)."""
        return PoolTransferResult.empty() if pool_transfers else PoolTransferResult(self.batch_exists(keys), {})

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: [False] * len(transfer.keys or []) for transfer in transfers}

    def batch_set_v2(self, transfers: Any, extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: [False] * len(transfer.keys or []) for transfer in transfers}

    @never_raise(lambda: None)
    def clear(self) -> None:
        self._storage.clear()

    @never_raise(lambda: None)
    def close(self) -> None:
        """Write what waits for the disk and give everything back. Idempotent."""
        self._finalize()

    # Parts of the above

    def _key(self, key: str) -> PrefixKey:
        assert self._namespace is not None, "SGLang registers its host pool before it asks"
        return PrefixKey(self._namespace.id + blake3(key.encode(), key=self._namespace.prefix_root).digest())

    @contextmanager
    def _pages(self, keys: Sequence[str]) -> Iterator[list[MemoryObj]]:
        """The pages of the leading hits among ``keys``, in host memory, held until the block is left."""
        chunks = [Chunk(self._key(key), index, index + 1) for index, key in enumerate(keys)]
        with PrefixLease.take(self._storage, chunks, lambda _: self._page_spec, layout=LAYOUT) as lease:
            lease.wait(self._manager.config.max_disk_wait_seconds)
            lease.cut()
            with lease.arrived(0, 0) as parts:
                yield [page for _, page in parts]

    @never_raise(lambda: 0)
    def _fill(self, keys: Sequence[str], targets: Sequence[torch.Tensor | None]) -> int:
        filled = 0
        with self._pages(keys) as pages:
            for page, target in zip(pages, targets, strict=False):
                if target is None or target.nbytes != page.spec.nbytes:
                    break
                target.view(torch.uint8).view(-1).copy_(page.bytes)
                filled += 1
        return filled

    @never_raise(lambda: 0)
    def _fill_pool(self, keys: Sequence[str], host_indices: torch.Tensor) -> int:
        filled = 0
        with self._pages(keys) as pages:
            for page, first in zip(pages, self._first_indices(host_indices), strict=False):
                self._pool.set_from_flat_data_page(first, page.bytes.view(self._page_dtype))
                filled += 1
        return filled

    @never_raise(lambda: 0)
    def _put_from_pool(self, keys: Sequence[str], host_indices: torch.Tensor) -> int:
        kept = 0
        for key, first in zip(keys, self._first_indices(host_indices), strict=False):
            if not self._put(key, self._pool.get_data_page(first)):
                break
            kept += 1
        return kept

    def _first_indices(self, host_indices: torch.Tensor) -> list[int]:
        """Where each page begins."""
        return [int(first) for first in host_indices[:: self._pool.page_size].tolist()]

    def _put(self, key: str, value: torch.Tensor) -> bool:
        name = self._key(key)
        if self._storage.renew(name):
            return True
        flat = value.contiguous().view(-1).view(torch.uint8)
        if flat.nbytes != self._page_spec.nbytes:
            raise ValueError(
                f"a page of {flat.nbytes} bytes; those of SGLang's host pool have {self._page_spec.nbytes}"
            )
        page = self._storage.allocate(self._page_spec)
        if page is None:
            return False
        with page:
            page.bytes.copy_(flat)
            return self._storage.put(name, page)
