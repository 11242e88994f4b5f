"""Our own vLLM connector, for what the built-in ``LMCacheConnectorV1`` does not pass on.

::

    --kv-transfer-config '{"kv_connector": "LMCacheConnectorV1Dynamic",
                           "kv_connector_module_path": "lmcache.integration.vllm.lmcache_connector_v1",
                           "kv_role": "kv_both"}'

It is the built-in one plus: loads that run beside the forward of other requests, an orderly shutdown, ``reset_cache``,
and our metrics in vLLM's own ``/metrics``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1

from lmcache.integration.vllm.prometheus import LMCachePromMetrics, LMCacheStats
from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorV1Impl

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats, PromMetric, PromMetricT
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request


class LMCacheConnectorV1Dynamic(LMCacheConnectorV1):
    """Shares :class:`LMCacheConnectorV1Impl` with the built-in connector."""

    _lmcache_engine: LMCacheConnectorV1Impl

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a save that is dropped is a later miss, so a preempted request keeps what it has generated."""
        return False

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = self._lmcache_engine.get_num_new_matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens) and self._lmcache_engine.load_is_asynchronous(request)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._lmcache_engine.update_state_after_alloc(request, num_external_tokens, blocks.get_block_ids()[0])

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self._lmcache_engine.handle_preemptions(kv_connector_metadata)

    def reset_cache(self) -> bool:
        return self._lmcache_engine.reset_cache()

    def shutdown(self) -> None:
        self._lmcache_engine.shutdown()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._lmcache_engine.stats_since_last()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return LMCacheStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> LMCachePromMetrics:
        return LMCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
