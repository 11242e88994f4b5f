"""``LMCacheManager``: builds the engine and its tiers from a configuration, and takes them down again."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from lmcache.cache_engine import EngineStats, LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.config.schema import GIB
from lmcache.keys import Shard
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.observability.logging import init_logger
from lmcache.observability.metrics import Metrics
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.segmentation.known_passages import KnownPassages
from lmcache.segmentation.passage_catalog import PassageCatalog
from lmcache.segmentation.shared_passages import SharedPassages
from lmcache.storage.codecs import make_codec
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.disk import DiskSettings, DiskTierError, LocalDiskTier
from lmcache.storage.disk.rank_directories import RankDirectory, open_foreign
from lmcache.storage.interface import StorageTier
from lmcache.storage.policies import make_policy
from lmcache.storage.remote.chunk_value import ChunkFormat
from lmcache.storage.remote.interface import StoreOptions
from lmcache.storage.remote.settings import RemoteSettings
from lmcache.storage.remote.stores import open_store
from lmcache.storage.remote.tier import LOOKUP_THREADS, RemoteTier
from lmcache.storage.resharded import ReshardedTier, ShardSource
from lmcache.storage.tiered import TieredStorage

if TYPE_CHECKING:
    from lmcache.storage.encryption import KeyRing

logger = init_logger(__name__)


class LMCacheManager:
    """The one place where parts are put together. A context manager that closes."""

    def __init__(
        self,
        config: LMCacheEngineConfig,
        metadata: LMCacheEngineMetadata,
        gpu_connector: GPUConnectorInterface | None = None,
    ) -> None:
        """A disk that cannot be used is said in the log and counted; everything goes on without it. A shared store may
        be away: it is used when it comes.

        Raises:
            ValueError: the configuration cannot work. Nothing is left behind then, nor after any other exception.
        """
        self.config = config
        self.metadata = metadata
        self.metrics = Metrics()
        with ExitStack() as started:
            memory = LocalCPUTier(int(config.max_local_cpu_size * GIB), config.cache_policy)
            started.callback(memory.close)
            foreign = self._foreign_directories()
            disk = self._open_disk(memory, shared=bool(foreign))
            remote = self._open_remote(memory)
            slower = [tier for tier in (disk, remote) if tier is not None]
            # Closes them all, the slow ones first.
            self.storage = TieredStorage(
                memory,
                slower,
                sources=self._open_foreign(foreign, memory) if disk is not None else (),
                keep_in_memory=config.local_cpu,
                metrics=self.metrics,
            )
            started.callback(self.storage.close)
            self.engine = LMCacheEngine(config, metadata, self.storage, gpu_connector)
            self.passages = self._know_passages(on_disk=disk is not None) if config.enable_blending else None
            self.shared_passages = (
                SharedPassages(remote, self.passages, config.remote_lookup_seconds)
                if remote is not None and self.passages is not None
                else None
            )
            started.pop_all()

    def _know_passages(self, *, on_disk: bool) -> KnownPassages:
        """What CacheBlend finds passages by; with a disk tier it outlives the process."""
        directory = self.config.local_disk
        catalog = PassageCatalog(directory) if on_disk and directory is not None else None
        return KnownPassages(self.config.chunk_size, self.storage.contains, catalog)

    def _foreign_directories(self) -> list[RankDirectory]:
        """Where this model's KV may lie that an engine with another number of ranks has kept."""
        if self.config.local_disk is None or self.metadata.pp_size > 1:
            return []
        try:
            return RankDirectory.at(self.config.local_disk).foreign()
        except OSError:
            return []  # who opens our own directory says why

    def _open_foreign(self, found: list[RankDirectory], memory: LocalCPUTier) -> list[StorageTier]:
        if not found:
            return []
        # Half of what all ranks together may take; each of us leaves that half of its share alone.
        share = self.config.max_local_disk_size * self.metadata.world_size / 2 / len(found)
        settings = self._disk_settings(int(share * GIB))
        sources: list[ShardSource] = []
        for directory in found:
            tier = open_foreign(directory, settings, memory.allocate, lambda: make_policy(self.config.cache_policy))
            if tier is not None:
                shard = Shard.of_heads(directory.rank, directory.world_size, self.metadata.total_kv_heads)
                sources.append(ShardSource(shard, tier))
        return [ReshardedTier(self.metadata.shard, sources, memory.allocate)] if sources else []

    def _disk_settings(self, capacity_bytes: int) -> DiskSettings:
        config = self.config
        assert config.local_disk is not None
        return DiskSettings(
            directory=config.local_disk,
            capacity_bytes=capacity_bytes,
            fsync=config.disk_fsync,
            read_threads=config.disk_io_threads,
            write_queue_bytes=int(config.disk_write_queue_size * GIB),
        )

    def _open_disk(self, memory: LocalCPUTier, *, shared: bool) -> LocalDiskTier | None:
        """``shared``: there are directories of other engines beside it, which are read and count too."""
        config = self.config
        if config.local_disk is None:
            return None
        settings = self._disk_settings(int(config.max_local_disk_size * GIB / (2 if shared else 1)))
        try:
            return LocalDiskTier(settings, memory.allocate, make_policy(config.cache_policy))
        except DiskTierError as error:
            self.metrics.failure("disk_start")
            logger.error("going on without the disk tier: %s", error)
            return None

    def _open_remote(self, memory: LocalCPUTier) -> RemoteTier | None:
        config = self.config
        if config.remote_url is None:
            return None
        chunk_format = ChunkFormat(make_codec(config.remote_codec), _keys(config))
        store = open_store(
            config.remote_url,
            StoreOptions(
                connections=config.remote_io_threads + config.remote_write_threads + LOOKUP_THREADS + 1,
                ttl_seconds=config.remote_ttl_seconds,
                extra=dict(config.extra_config),
            ),
        )
        settings = RemoteSettings(
            timeout=config.remote_timeout_seconds,
            lookup_timeout=config.remote_lookup_seconds,
            read_threads=config.remote_io_threads,
            write_threads=config.remote_write_threads,
            write_queue_bytes=int(config.remote_write_queue_size * GIB),
        )
        return RemoteTier(store, settings, memory.allocate, chunk_format)

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        """Write what is on its way to slower tiers and give everything back. Idempotent."""
        if self.passages is not None:
            self.passages.close()
        self.engine.close()

    def __enter__(self) -> LMCacheManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _keys(config: LMCacheEngineConfig) -> KeyRing | None:
    """Raises:
    ValueError: the keys cannot be used, or what encrypts is not installed.
    """
    file, secret = config.remote_encryption_key_file, config.remote_encryption_keys
    if file is None and secret is None:
        return None
    try:
        from lmcache.storage.encryption import KeyRing
    except ImportError as error:
        raise ValueError(f"encryption: {error}; pip install 'lmcache-blend[encryption]'") from error
    if file is not None:
        return KeyRing.from_file(file)
    assert secret is not None
    return KeyRing.parse(secret.get_secret_value(), "remote_encryption_keys")
