"""The cache of one SGLang process, attached to its pools: what every connector of generations A and B is."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.util import Finalize
from typing import Any

import torch

from lmcache.config import LMCacheEngineConfig
from lmcache.integration.guard import never_raise
from lmcache.integration.sglang import server_settings, shared_engine
from lmcache.integration.sglang.pool_cache import PoolCache
from lmcache.integration.sglang.shared_engine import RankOf, UnsupportedSetupError
from lmcache.manager import LMCacheManager
from lmcache.observability.events import CacheStoreEvent
from lmcache.observability.logging import configure_for_engine, init_logger
from lmcache.observability.metrics import Metrics

logger = init_logger(__name__)


class AttachedCache:
    """Built from what SGLang passes to its connectors. In a set-up that is not supported every call is a miss."""

    def __init__(
        self,
        sgl_config: Any,
        tp_size: int,
        rank: int,
        k_pool: Sequence[torch.Tensor],
        v_pool: Sequence[torch.Tensor],
        *,
        tp_group: Any,
        page_size: int | None = None,
        config_file: str | None = None,
    ) -> None:
        """Raises:
        ValueError: the configuration is wrong; the message names the key, the value and where it came from.
        """
        configure_for_engine()
        self._manager: LMCacheManager | None = None
        self._cache: PoolCache | None = None
        self._no_metrics = Metrics()
        try:
            _refuse_what_calls_do_not_tell()
            _refuse_part_of_a_share(sgl_config, tp_size, k_pool)
            manager = shared_engine.build(
                sgl_config,
                k_pool,
                v_pool,
                rank=RankOf(tp_size, rank),
                kv_dtype=server_settings.kv_dtype(k_pool[0].dtype),
                config_file=config_file or None,
            )
        except UnsupportedSetupError as reason:
            logger.error("The KV cache stays off: %s", reason)
            self._chunk_size = LMCacheEngineConfig.load().chunk_size
            return
        self._manager = manager
        self._chunk_size = manager.config.chunk_size
        self._cache = PoolCache(
            manager.engine,
            device=k_pool[0].device,
            page_size=page_size or server_settings.page_size(),
            tp_group=tp_group,
        )
        # SGLang closes nothing: what waits for the disk is written when the connector goes or the process ends. Its
        # scheduler is a child of multiprocessing, which leaves without `atexit` but runs these.
        self._close = Finalize(self, manager.close, exitpriority=0)

    @property
    def metrics(self) -> Metrics:
        return self._no_metrics if self._manager is None else self._manager.metrics

    def chunk_size(self) -> int:
        """Tokens in a chunk."""
        return self._chunk_size

    @never_raise(list)
    def get_kv_events(self) -> list[CacheStoreEvent]:
        """What was stored since the last call; nothing without ``enable_kv_events``."""
        return [] if self._cache is None else self._cache.engine.take_events()

    @never_raise(lambda: None)
    def reset(self) -> None:
        """Forget everything that is held, in every tier."""
        if self._cache is not None:
            self._cache.engine.clear()

    @never_raise(lambda: None)
    def close(self) -> None:
        """Write what waits for the disk and give everything back; from now on all is a miss. Idempotent."""
        if self._manager is not None:
            self._close()


def _refuse_what_calls_do_not_tell() -> None:
    """These versions of SGLang hand over nothing but tokens and slots."""
    algorithm = server_settings.speculative_algorithm()
    if algorithm is not None and algorithm.upper() != "NGRAM":
        raise UnsupportedSetupError(
            f"speculative decoding with {algorithm}: the draft model's KV is not kept, so what is loaded would lack it"
        )
    if server_settings.lora_enabled():
        raise UnsupportedSetupError(
            "LoRA: this SGLang does not say which adapter a request uses, and their KV differs; use SGLang 0.5.21 or "
            "later, or serve without adapters"
        )


def _refuse_part_of_a_share(sgl_config: Any, tp_size: int, k_pool: Sequence[torch.Tensor]) -> None:
    """Nor do they say which pipeline stage or attention group this is: its keys would be those of the others."""
    found = (len(k_pool), *k_pool[0].shape[1:])
    expected = (sgl_config.num_hidden_layers, sgl_config.get_num_kv_heads(tp_size), sgl_config.head_dim)
    if found != expected:
        raise UnsupportedSetupError(
            f"the pools hold {found} layers, KV heads and dims, but this rank's share of the model is {expected}: "
            "pipeline parallelism and attention data parallelism are not supported"
        )
