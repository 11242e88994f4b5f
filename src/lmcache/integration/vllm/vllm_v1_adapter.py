"""What vLLM's built-in ``LMCacheConnectorV1`` looks for: one class for both roles."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from lmcache.integration.vllm.blend.make_scheduling import make_scheduling
from lmcache.integration.vllm.connector_metadata import LMCacheConnectorMetadata
from lmcache.integration.vllm.parallel.agreement import TensorParallelAgreement
from lmcache.integration.vllm.parallel.placement import roles_share_a_process
from lmcache.integration.vllm.parallel.rank_service import RankService
from lmcache.integration.vllm.parallel.ranked_cache import RankedCache
from lmcache.integration.vllm.scheduler_side import SchedulerSide
from lmcache.integration.vllm.shared_engine import SharedEngine, UnsupportedSetupError, refuse_unsupported
from lmcache.integration.vllm.worker_side import WorkerSide
from lmcache.observability.events import CacheStoreEvent
from lmcache.observability.hook_times import HookTimes, engine_hook
from lmcache.observability.logging import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)


def _is_in_step(connector: KVConnectorBase_V1) -> bool:
    """Whether vLLM has told ``connector`` of a step and not yet that it has ended. Holds no reference by itself."""
    return bool(connector.has_connector_metadata())


class LMCacheConnectorV1Impl:
    """Prefix reuse and CacheBlend for vLLM. No method raises into vLLM; without a usable set-up every call is a miss.

    The constructor does raise on a configuration that is wrong: that is the moment to say so.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, parent: KVConnectorBase_V1) -> None:
        """Args:
        vllm_config: vLLM's whole configuration; ``kv_connector_extra_config["lmcache.<key>"]`` overrides ours.
        role: SCHEDULER or WORKER; the methods of the other role must not be called.
        parent: the connector that delegates to this object; holds each step's metadata.
        """
        self._parent = weakref.proxy(parent)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._ranks: RankedCache | None = None
        self.hooks = HookTimes()
        """Of this role; both roles' where they share a process."""
        # A load that fails must be computed, not answered with an error (vLLM's default).
        vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
        self._release: Callable[[], object] | None = None
        apart = not roles_share_a_process(vllm_config)
        try:
            if apart and role == KVConnectorRole.SCHEDULER:
                refuse_unsupported(vllm_config, parent._kv_cache_config)
                self._ranks = RankedCache(vllm_config)
                self.hooks = self._ranks.metrics.hooks
                self._scheduler = SchedulerSide(self._ranks, partial(make_scheduling, self._ranks, vllm_config))
                return
            name, shared = SharedEngine.acquire(vllm_config, parent._kv_cache_config)
        except UnsupportedSetupError as reason:
            logger.error("The KV cache stays off: %s", reason)
            return
        self.hooks = shared.metrics.hooks
        # The built-in wrapper passes no shutdown on: whoever drops the connector drops its engine.
        self._release = weakref.finalize(self, SharedEngine.release, name)
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(shared, partial(make_scheduling, shared, vllm_config))
            return
        if apart:
            RankService.start(shared, vllm_config)
        agreement = TensorParallelAgreement.of_vllm() if apart else None
        self._worker = WorkerSide(shared, vllm_config, partial(_is_in_step, self._parent), agreement)

    # Worker role, in the order of a step

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is not None:
            self._worker.register_kv_caches(kv_caches)

    def handle_preemptions(self, meta: KVConnectorMetadata) -> None:
        """Nothing left to do: a step's preempted requests are waited for when its metadata is bound."""

    @engine_hook
    def bind_connector_metadata(self, meta: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(meta, LMCacheConnectorMetadata):
            self._worker.bind_connector_metadata(meta)

    @engine_hook
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if self._worker is None:
            return
        meta = self._parent._get_connector_metadata()
        if isinstance(meta, LMCacheConnectorMetadata):
            self._worker.start_load_kv(meta, forward_context)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Called for every layer of every step, so its time is counted only where there is something to load."""
        if self._worker is not None and self._worker.loads_by_layer:
            self._worker.wait_for_layer_load(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Saves wait for the whole forward: per-layer hooks do not replay inside CUDA graphs."""

    @engine_hook
    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.wait_for_save()

    @engine_hook
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._worker.get_finished() if self._worker is not None else (None, None)

    @engine_hook
    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.get_block_ids_with_load_errors() if self._worker is not None else set()

    @engine_hook
    def get_kv_events(self) -> Iterable[CacheStoreEvent]:
        return self._worker.get_kv_events() if self._worker is not None else []

    # Scheduler role

    @engine_hook
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        if self._scheduler is None:
            return 0
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    @engine_hook
    def update_state_after_alloc(
        self, request: Request, num_external_tokens: int, block_ids: list[int] | None = None
    ) -> None:
        """``block_ids`` are given only when the load was announced as asynchronous."""
        if self._scheduler is not None:
            self._scheduler.update_state_after_alloc(request, num_external_tokens, block_ids)

    @engine_hook
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if self._scheduler is None:
            return LMCacheConnectorMetadata()
        meta = self._scheduler.build_connector_meta(scheduler_output)
        if self._ranks is not None:
            self._ranks.planned(meta)
        return meta

    def load_is_asynchronous(self, request: Request) -> bool:
        """Whether the load of what was just promised may run beside the forward."""
        return self._scheduler is None or self._scheduler.load_is_asynchronous(request)

    @engine_hook
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.request_finished(request, block_ids) if self._scheduler is not None else (False, None)

    # Only the dynamic connector passes these on

    def reset_cache(self) -> bool:
        return self._scheduler.reset_cache() if self._scheduler is not None else True

    @engine_hook
    def stats_since_last(self) -> KVConnectorStats | None:
        """Growth of our counters since the last step.

        The worker role tells it, so that it is told once; a scheduler role in a process of its own tells what it
        counted itself.
        """
        if self._ranks is not None:
            return self._ranks.stats.since_last()
        return self._worker.stats_since_last() if self._worker is not None else None

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._ranks is not None:
            self._ranks.close()
        if self._release is not None:
            self._release()
