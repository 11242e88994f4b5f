"""The engine that the scheduler role and the worker role of one vLLM process share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, ClassVar

from lmcache.blend.passage_lease import PassageLease
from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.vllm.background_loads import BackgroundLoads
from lmcache.integration.vllm.blend.blender import Blender
from lmcache.integration.vllm.blend.scheduling import BlendScheduling, PreparedBlend
from lmcache.integration.vllm.connector_metadata import BlendOp, LMCacheConnectorMetadata
from lmcache.integration.vllm.deferred_release import DeferredReleases
from lmcache.integration.vllm.model_identity import engine_metadata
from lmcache.integration.vllm.parallel.placement import config_of_rank, reason_against
from lmcache.integration.vllm.parallel.ranked_lease import RankedLease
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
    """One per vLLM engine, or, where scheduler and ranks are processes of their own, one per rank.

    ``handed_over`` carries a lease from the role that took it to the role that loads, by the name that
    :meth:`hand_over` gave it; ``failed_loads`` tells the way back which requests got nothing after all. So do
    ``prepared_blends`` and ``blend_reports``; ``held_passages`` waits for blends that another process prepares.
    ``blender`` is there once the worker role has found that the model can be blended, ``begins_early`` once there is a
    worker role.

    Both roles :meth:`acquire` it by the engine id that vLLM gives them; when the last one lets go, or at exit, saves
    under way are finished and everything is closed, ``companions`` first.
    """

    manager: LMCacheManager
    saves: PendingSaves = field(default_factory=PendingSaves)
    loads: BackgroundLoads = field(default_factory=BackgroundLoads)
    releases: DeferredReleases = field(default_factory=DeferredReleases)
    handed_over: dict[str, PrefixLease] = field(default_factory=dict)
    failed_loads: set[str] = field(default_factory=set)
    held_passages: dict[str, PassageLease] = field(default_factory=dict)
    blender: Blender | None = None
    begins_early: Callable[[LMCacheConnectorMetadata], None] | None = None
    blend_scheduling: BlendScheduling | None = None
    prepared_blends: dict[str, PreparedBlend] = field(default_factory=dict)
    blend_reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    companions: ExitStack = field(default_factory=ExitStack)
    _holders: int = 0

    _live: ClassVar[dict[str, SharedEngine]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @property
    def engine(self) -> LMCacheEngine:
        return self.manager.engine

    @property
    def serves(self) -> bool:
        """Whether the worker role knows its pages and can use them."""
        return self.engine.gpu_connector is not None

    @property
    def blends(self) -> bool:
        """Whether the worker role can blend its model."""
        return self.blender is not None

    def hand_over(self, req_id: str, lease: PrefixLease | RankedLease) -> str:
        """The worker role may load what ``lease`` holds; its name there."""
        assert isinstance(lease, PrefixLease)
        self.handed_over[req_id] = lease
        return req_id

    def hand_over_blend(self, op: BlendOp, prepared: PreparedBlend, params: Mapping[str, Any]) -> BlendOp:
        """The worker role may do ``op``, for a request that came with ``params``; what to tell it."""
        self.prepared_blends[op.req_id] = prepared
        return op

    def send_ahead(self, lease: PrefixLease | RankedLease, start: int) -> None:
        """The worker role will be given ``lease`` in this step, unless vLLM finds no room for its request, and load
        what it holds from token ``start`` on."""
        assert isinstance(lease, PrefixLease)
        self.engine.send_ahead(lease, start)

    def stage(self, prepared: PreparedBlend) -> None:
        """The worker role will be given ``prepared`` in this step, unless vLLM finds no room for its request."""
        if self.blender is not None:
            self.blender.stage(prepared)

    def begin_early(self, meta: LMCacheConnectorMetadata) -> None:
        """The worker role, if it is in this process, may start a step that is planned."""
        if self.begins_early is not None:
            self.begins_early(meta)

    def settle(self, req_id: str) -> None:
        """``req_id`` has ended. The worker role has told what became of it already."""

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
            UnsupportedSetupError: the ranks are where they cannot be served, or the model's KV is not full attention's.
            ValueError: the configuration is wrong (names the key, the value and where it came from).
        """
        configure_for_engine()
        refuse_unsupported(vllm_config, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        name = str(transfer.engine_id)
        with cls._lock:
            if name not in cls._live:
                if not cls._live:
                    cls._close_at_exit()
                parallel = vllm_config.parallel_config
                config = LMCacheEngineConfig.load(engine_overrides=transfer.kv_connector_extra_config)
                config = config_of_rank(config, parallel.rank, parallel.world_size)
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
        self.begins_early = None
        self.companions.close()
        self.loads.close()
        self.saves.close()
        self.releases.close()
        for lease in self.handed_over.values():
            lease.release()
        self.handed_over.clear()
        for passages in self.held_passages.values():
            passages.release()
        self.held_passages.clear()
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


def refuse_unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raises:
    UnsupportedSetupError: see :meth:`SharedEngine.acquire`.
    """
    if (reason := reason_against(vllm_config)) is not None:
        raise UnsupportedSetupError(reason)
    _refuse_partial_kv(kv_cache_config)


def _refuse_partial_kv(kv_cache_config: KVCacheConfig) -> None:
    """Blocks that slide out of a window are freed in mid-request, and recurrent state is no KV of single tokens."""
    kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
    if len(kinds) != 1 or kinds[0] not in ("FullAttentionSpec", "MLAAttentionSpec"):
        raise UnsupportedSetupError(
            f"the model's KV cache groups are {kinds}: only one group of full attention (or MLA) is supported so far"
        )
