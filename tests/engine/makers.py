"""Two ways to come to an engine: its storage is in this process, or a server's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lmcache.cache_engine import LMCacheEngine
from lmcache.config.schema import GIB
from lmcache.manager import LMCacheManager
from lmcache.memory.shared_memory import SharedMemorySource
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.server.server import CacheServer
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.interface import StorageTier
from lmcache.storage.tiered import TieredStorage
from tests.engine.helpers import SlowTier, make_config, make_engine, make_metadata
from tests.eventually import eventually


class EngineMaker(Protocol):
    memory: LocalCPUTier
    """Of the engine that was made last, if that is in this process."""

    def __call__(
        self,
        slower: Sequence[StorageTier] = (),
        *,
        metadata: LMCacheEngineMetadata | None = None,
        connector: GPUConnectorInterface | None = None,
        **overrides: Any,
    ) -> LMCacheEngine: ...


class InProcess:
    memory: LocalCPUTier

    def __call__(self, slower: Sequence[StorageTier] = (), **settings: Any) -> LMCacheEngine:
        engine = make_engine(slower, **settings)
        assert isinstance(engine.storage, TieredStorage)
        self.memory = engine.storage.memory
        return engine


class OnServer:
    """Engines of one server process. With slower tiers, which are the test's to steer, of a server in this process.

    When the context is left, the process must have everything back.
    """

    memory: LocalCPUTier

    def __init__(self, process: Path, own: Path) -> None:
        """``process``: its socket. ``own``: where servers in this process listen, each with a number before it."""
        self._process = process
        self._own = own
        self._servers: list[CacheServer] = []

    def __call__(
        self,
        slower: Sequence[StorageTier] = (),
        *,
        metadata: LMCacheEngineMetadata | None = None,
        connector: GPUConnectorInterface | None = None,
        **overrides: Any,
    ) -> LMCacheEngine:
        socket = self._process
        if slower:
            socket = self._serve(slower, **overrides)
        config = make_config(server_socket=socket, **overrides)
        return LMCacheManager(config, metadata or make_metadata(), connector).engine

    def _serve(self, slower: Sequence[StorageTier], **overrides: Any) -> Path:
        config = make_config(**overrides)
        memory = LocalCPUTier(
            int(config.max_local_cpu_size * GIB), config.cache_policy, shared=SharedMemorySource(), pin_memory=False
        )
        for tier in slower:
            if isinstance(tier, SlowTier):
                tier.allocate = memory.allocate
        storage = TieredStorage(memory, slower, keep_in_memory=config.local_cpu)
        path = self._own.with_name(f"{len(self._servers)}-{self._own.name}")
        self._servers.append(CacheServer(path, memory, storage))
        self.memory = memory
        return path

    def __enter__(self) -> OnServer:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        with LMCacheManager(make_config(server_socket=self._process), make_metadata()) as manager:
            manager.engine.clear()
            assert is_empty(manager.engine), "references were lost"


def is_empty(engine: LMCacheEngine) -> bool:
    """Whether nobody holds memory, which a server hears a little later."""
    return eventually(lambda: engine.stats().tiers["memory"].used_bytes == 0)
