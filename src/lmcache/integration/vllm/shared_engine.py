"""The engine that the scheduler role and the worker role of one vLLM process share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, ClassVar

from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.vllm.background_loads import BackgroundLoads
from lmcache.integration.vllm.blend.blender import Blender
from lmcache.integration.vllm.blend.scheduling import BlendScheduling, PreparedBlend
from lmcache.integration.vllm.deferred_release import DeferredReleases
from lmcache.integration.vllm.model_identity import engine_metadata
from lmcache.integration.vllm.pending_saves import PendingSaves
from lmcache.lease import PrefixLease
from lmcache.manager import LMCacheManager
from lmcache.observability.logging import configure_for_engine, init_logger
from lmcache.observability.metrics import Metrics

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(__name__)


class UnsupportedSetupError(RuntimeError):
    """This vLLM is set up in a way that the cache cannot serve; it runs on without."""


@dataclass
class SharedEngine:
    """One per vLLM engine.

    ``handed_over`` carries a request's lease from the role that took it to the role that loads; ``failed_loads`` tells
    the way back which requests got nothing after all. So do ``prepared_blends`` and ``blend_reports``; ``blender`` is
    there once the worker role has found that the model can be blended.

    Both roles :meth:`acquire` it by the engine id that vLLM gives them; when the last one lets go, or at exit, saves
    under way are finished and everything is closed.
    """

    manager: LMCacheManager
    saves: PendingSaves = field(default_factory=PendingSaves)
    loads: BackgroundLoads = field(default_factory=BackgroundLoads)
    releases: DeferredReleases = field(default_factory=DeferredReleases)
    handed_over: dict[str, PrefixLease] = field(default_factory=dict)
    failed_loads: set[str] = field(default_factory=set)
    blender: Blender | None = None
    blend_scheduling: BlendScheduling | None = None
    prepared_blends: dict[str, PreparedBlend] = field(default_factory=dict)
    blend_reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    _holders: int = 0

    _live: ClassVar[dict[str, SharedEngine]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @property
    def engine(self) -> LMCacheEngine:
        return self.manager.engine

    @property
    def config(self) -> LMCacheEngineConfig:
        return self.manager.config

    @property
    def metrics(self) -> Metrics:
        return self.manager.metrics

    @classmethod
    def acquire(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> tuple[str, SharedEngine]:
        """The engine of this ``vllm_config``, built on first use, and the name to :meth:`release` it by.

        Raises:
            UnsupportedSetupError: the roles do not live in one process, or the model's KV is not full attention's.
            ValueError: the configuration is wrong (names the key, the value and where it came from).
        """
        configure_for_engine()
        _refuse_split_roles(vllm_config)
        _refuse_partial_kv(kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        name = str(transfer.engine_id)
        with cls._lock:
            if name not in cls._live:
                if not cls._live:
                    cls._close_at_exit()
                config = LMCacheEngineConfig.load(engine_overrides=transfer.kv_connector_extra_config)
                cls._live[name] = cls(LMCacheManager(config, engine_metadata(vllm_config, config.chunk_size)))
            shared = cls._live[name]
            shared._holders += 1
        return name, shared

    @classmethod
    def release(cls, name: str) -> None:
        """Give back one :meth:`acquire`."""
        with cls._lock:
            shared = cls._live.get(name)
            if shared is None:
                return
            shared._holders -= 1
            if shared._holders > 0:
                return
            del cls._live[name]
        shared.close()

    def close(self) -> None:
        self.loads.close()
        self.saves.close()
        self.releases.close()
        for lease in self.handed_over.values():
            lease.release()
        self.handed_over.clear()
        for prepared in self.prepared_blends.values():
            prepared.lease.release()
        self.prepared_blends.clear()
        self.manager.close()

    @classmethod
    def _close_at_exit(cls) -> None:
        """Write what is still queued for the disk: vLLM's built-in wrapper passes no shutdown on.

        vLLM's engine process is a child of multiprocessing, which leaves without `atexit` but runs these.
        """
        Finalize(None, cls.close_all, exitpriority=0)

    @classmethod
    def close_all(cls) -> None:
        with cls._lock:
            live, cls._live = list(cls._live.values()), {}
        for shared in live:
            shared.close()


def _refuse_split_roles(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if parallel.world_size > 1:
        raise UnsupportedSetupError(
            f"tensor × pipeline parallel size is {parallel.world_size}: only 1 is supported so far, "
            "because scheduler and workers must share one process"
        )
    if parallel.distributed_executor_backend not in (None, "uni"):
        raise UnsupportedSetupError(
            f"--distributed-executor-backend {parallel.distributed_executor_backend}: only 'uni' is supported so far, "
            "because scheduler and worker must share one process (on a CPU set VLLM_ENABLE_V1_MULTIPROCESSING=0)"
        )


def _refuse_partial_kv(kv_cache_config: KVCacheConfig) -> None:
    """Blocks that slide out of a window are freed in mid-request, and recurrent state is no KV of single tokens."""
    kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
    if len(kinds) != 1 or kinds[0] not in ("FullAttentionSpec", "MLAAttentionSpec"):
        raise UnsupportedSetupError(
            f"the model's KV cache groups are {kinds}: only one group of full attention (or MLA) is supported so far"
        )
