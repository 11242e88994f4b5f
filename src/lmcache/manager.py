"""``LMCacheManager``: builds the engine and its tiers from a configuration, and takes them down again."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import TracebackType
from typing import ClassVar

from lmcache.cache_engine import EngineStats, LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.config.schema import GIB
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.observability.logging import init_logger
from lmcache.observability.metrics import Metrics
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.disk import DiskSettings, DiskTierError, LocalDiskTier
from lmcache.storage.interface import StorageTier
from lmcache.storage.policies import make_policy
from lmcache.storage.tiered import TieredStorage

logger = init_logger(__name__)


class LMCacheManager:
    """The one place where parts are put together. A context manager that closes.

    A disk that cannot be used is said in the log, and everything goes on without it.
    """

    def __init__(
        self,
        config: LMCacheEngineConfig,
        metadata: LMCacheEngineMetadata,
        gpu_connector: GPUConnectorInterface | None = None,
    ) -> None:
        self.config = config
        self.metadata = metadata
        self.metrics = Metrics()
        with ExitStack() as started:
            memory = LocalCPUTier(int(config.max_local_cpu_size * GIB), config.cache_policy)
            started.callback(memory.close)
            disk = _open_disk(config, memory)
            if disk is not None:
                started.callback(disk.close)
            self.storage = TieredStorage(
                memory,
                [disk] if disk is not None else [],
                keep_in_memory=config.local_cpu,
                metrics=self.metrics,
            )
            self.metrics.watch_tiers(self.storage.stats)
            self.engine = LMCacheEngine(config, metadata, self.storage, gpu_connector, self.metrics)
            started.pop_all()  # all is well: closing is the manager's business now

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        """Write what waits to be written and give everything back. Idempotent."""
        self.engine.close()

    def __enter__(self) -> LMCacheManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_disk(config: LMCacheEngineConfig, memory: LocalCPUTier) -> StorageTier | None:
    if config.local_disk is None:
        return None
    settings = DiskSettings(
        directory=config.local_disk,
        capacity_bytes=int(config.max_local_disk_size * GIB),
        fsync=config.disk_fsync,
        read_threads=config.disk_io_threads,
        write_queue_bytes=int(config.disk_write_queue_size * GIB),
    )
    try:
        return LocalDiskTier(settings, memory.allocate, make_policy(config.cache_policy))
    except DiskTierError as error:
        logger.error("Going on without the disk tier: %s", error)
        return None


class LMCacheEngineBuilder:
    """Engines by name, for callers that cannot pass one around."""

    _managers: ClassVar[dict[str, LMCacheManager]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def get_or_create(
        cls,
        instance_id: str,
        config: LMCacheEngineConfig,
        metadata: LMCacheEngineMetadata,
        gpu_connector: GPUConnectorInterface | None = None,
    ) -> LMCacheEngine:
        """The engine named ``instance_id``, built on the first call.

        Raises:
            ValueError: it exists and was built from something else.
        """
        with cls._lock:
            manager = cls._managers.get(instance_id)
            if manager is None:
                manager = cls._managers[instance_id] = LMCacheManager(config, metadata, gpu_connector)
                return manager.engine
        for name, live, asked in (
            ("config", manager.config, config),
            ("metadata", manager.metadata, metadata),
            ("gpu_connector", manager.engine.gpu_connector, gpu_connector),
        ):
            if live != asked:
                raise ValueError(
                    f"engine {instance_id!r} exists with another {name}: {live!r}, not {asked!r}; "
                    "destroy it first or use another instance_id"
                )
        return manager.engine

    @classmethod
    def get(cls, instance_id: str) -> LMCacheEngine | None:
        with cls._lock:
            manager = cls._managers.get(instance_id)
        return manager.engine if manager is not None else None

    @classmethod
    def destroy(cls, instance_id: str) -> None:
        """Close the engine named ``instance_id``; nothing happens without one."""
        with cls._lock:
            manager = cls._managers.pop(instance_id, None)
        if manager is not None:
            manager.close()
