"""A server out of a configuration."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lmcache.config import LMCacheEngineConfig
from lmcache.config.schema import GIB
from lmcache.memory.shared_memory import SharedMemorySource
from lmcache.observability.metrics import Metrics
from lmcache.segmentation.passage_catalog import PassageCatalog
from lmcache.server.server import CacheServer
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.from_config import disk_format, open_disk, open_remote
from lmcache.storage.tiered import TieredStorage


def open_server(config: LMCacheEngineConfig, path: Path, *, allowed_uids: frozenset[int] = frozenset()) -> CacheServer:
    """Memory, disk and shared store as ``config`` says; listens at ``path``. Nothing is left behind after an exception.

    Raises:
        ValueError: the configuration cannot work.
        OSError: there is no listening at ``path``.
    """
    if config.inexact_codec:
        raise ValueError(
            f"codec {config.inexact_codec}: a server keeps only what is exact, because the engines that attach "
            "do not know of its codec; use raw or zstd"
        )
    metrics = Metrics()
    with ExitStack() as started:
        memory = LocalCPUTier(
            int(config.max_local_cpu_size * GIB),
            config.cache_policy,
            pin_memory=False,
            shared=SharedMemorySource(huge_pages=config.server_huge_pages),
        )
        started.callback(memory.close)
        disk = open_disk(config, memory.allocate, metrics)
        remote = open_remote(config, memory.allocate)
        slower = [tier for tier in (disk, remote) if tier is not None]
        storage = TieredStorage(memory, slower, keep_in_memory=config.local_cpu, metrics=metrics)
        started.callback(storage.close)
        catalog = None
        if disk is not None and config.local_disk is not None:
            catalog = PassageCatalog(config.local_disk, disk_format(config))
            started.callback(catalog.close)
        server = CacheServer(path, memory, storage, catalog=catalog, allowed_uids=allowed_uids)
        started.pop_all()
    return server
