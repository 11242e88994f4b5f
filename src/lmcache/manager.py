"""``LMCacheManager``: builds the engine and its tiers from a configuration, and takes them down again."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

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
from lmcache.server.client import ServerClient
from lmcache.server.shared_knowledge import share_passages
from lmcache.server.storage import ServerStorage
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.disk.rank_directories import RankDirectory, open_foreign
from lmcache.storage.from_config import disk_format, disk_settings, open_disk, open_remote
from lmcache.storage.interface import StorageTier
from lmcache.storage.kv_storage import KVStorage
from lmcache.storage.policies import make_policy
from lmcache.storage.remote.other_sizes import OtherSizes
from lmcache.storage.resharded import ReshardedTier, ShardSource
from lmcache.storage.tiered import TieredStorage

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
        self.storage: KVStorage
        self.passages: KnownPassages | None = None
        self.shared_passages: SharedPassages | None = None
        with ExitStack() as started:
            if config.server_socket is not None:
                self._attach(config.server_socket, started, gpu_connector)
            else:
                self._build_tiers(started, gpu_connector)
            started.pop_all()

    def _attach(self, socket: Path, started: ExitStack, gpu_connector: GPUConnectorInterface | None) -> None:
        """The tiers are those of a server. It may be away, and come later."""
        config = self.config
        client = ServerClient(socket, config.server_timeout_seconds, self.metrics)
        self.storage = ServerStorage(client, self.metrics)
        started.callback(self.storage.close)
        self.engine = LMCacheEngine(config, self.metadata, self.storage, gpu_connector)
        if config.enable_blending:
            self.passages = KnownPassages(
                config.chunk_size, self.storage.contains, alive_each=self.storage.holds, loaded=False
            )
            share_passages(client, self.passages)

    def _build_tiers(self, started: ExitStack, gpu_connector: GPUConnectorInterface | None) -> None:
        config, metadata = self.config, self.metadata
        memory = LocalCPUTier(int(config.max_local_cpu_size * GIB), config.cache_policy)
        started.callback(memory.close)
        foreign = self._foreign_directories()
        # Directories of other engines beside it are read, and count too.
        disk = open_disk(config, memory.allocate, self.metrics, share=0.5 if foreign else 1.0)
        other_sizes = OtherSizes(metadata.namespace(codec=config.inexact_codec), metadata.total_kv_heads)
        remote = open_remote(config, memory.allocate, other_sizes)
        # Closes them all, the slow ones first.
        self.storage = TieredStorage(
            memory,
            [tier for tier in (disk, remote) if tier is not None],
            sources=self._open_resharded(
                memory,
                self._open_foreign(foreign, memory) if disk is not None else [],
                [] if remote is None else [ShardSource(shard, remote) for shard in other_sizes.shards],
            ),
            keep_in_memory=config.local_cpu,
            metrics=self.metrics,
        )
        started.callback(self.storage.close)
        self.engine = LMCacheEngine(config, metadata, self.storage, gpu_connector)
        if config.enable_blending:
            self.passages = self._know_passages(on_disk=disk is not None)
            if remote is not None:
                self.shared_passages = SharedPassages(remote, self.passages, config.remote_lookup_seconds)

    def _know_passages(self, *, on_disk: bool) -> KnownPassages:
        """What CacheBlend finds passages by; with a disk tier it outlives the process."""
        directory = self.config.local_disk
        catalog = None
        if on_disk and directory is not None:
            catalog = PassageCatalog(directory, disk_format(self.config))
        return KnownPassages(self.config.chunk_size, self.storage.contains, catalog, alive_each=self.storage.holds)

    def _foreign_directories(self) -> list[RankDirectory]:
        """Where this model's KV may lie that an engine with another number of ranks has kept."""
        if self.config.local_disk is None or self.metadata.pp_size > 1:
            return []
        try:
            return RankDirectory.at(self.config.local_disk).foreign()
        except OSError:
            return []  # who opens our own directory says why

    def _open_resharded(
        self, memory: LocalCPUTier, on_disk: list[ShardSource], in_store: list[ShardSource]
    ) -> list[StorageTier]:
        if not on_disk and not in_store:
            return []
        return [ReshardedTier(self.metadata.shard, on_disk, memory.allocate, shared=in_store)]

    def _open_foreign(self, found: list[RankDirectory], memory: LocalCPUTier) -> list[ShardSource]:
        if not found:
            return []
        # Half of what all ranks together may take; each of us leaves that half of its share alone.
        share = self.config.max_local_disk_size * self.metadata.world_size / 2 / len(found)
        settings = disk_settings(self.config, int(share * GIB))
        sources: list[ShardSource] = []
        chunk_format = disk_format(self.config)
        for directory in found:
            tier = open_foreign(
                directory, settings, memory.allocate, lambda: make_policy(self.config.cache_policy), chunk_format
            )
            if tier is not None:
                shard = Shard.of_heads(directory.rank, directory.world_size, self.metadata.total_kv_heads)
                sources.append(ShardSource(shard, tier))
        return sources

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
