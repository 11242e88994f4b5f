"""What SGLang 0.5.10 to 0.5.20 looks for behind ``--enable-lmcache``: in-process connectors to its pools."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.guard import never_raise
from lmcache.integration.sglang.attached_cache import AttachedCache
from lmcache.integration.sglang.kv_requests import LoadMetadata, StoreMetadata
from lmcache.integration.sglang.model_identity import engine_metadata
from lmcache.integration.sglang.stored_nodes import StoredNodes
from lmcache.integration.sglang.tp_agreement import min_over_ranks
from lmcache.manager import LMCacheManager

__all__ = [
    "LMCacheConnector",
    "LMCacheLayerwiseConnector",
    "LoadMetadata",
    "StoreMetadata",
    "init_lmcache_engine",
]


def init_lmcache_engine(
    model_config: Any, tp_size: int, local_rank: int, global_rank: int, kv_dtype: torch.dtype
) -> LMCacheEngine:
    """An engine of this rank's own, without a connector to any pool; ``close()`` it at the end.

    Args:
        model_config: SGLang's ``ModelConfig``.
        local_rank: the rank on this host; does not matter here.
        kv_dtype: of the pools.

    Raises:
        ValueError: the configuration is wrong; the message names the key, the value and where it came from.
    """
    config = LMCacheEngineConfig.load()
    metadata = engine_metadata(
        model_config, tp_size=tp_size, tp_rank=global_rank, kv_dtype=kv_dtype, chunk_size=config.chunk_size
    )
    return LMCacheManager(config, metadata).engine


class LMCacheConnector(AttachedCache):
    """Loads and stores whole prompts. No method raises; the constructor does, on a configuration that is wrong."""

    def __init__(
        self,
        sgl_config: Any,
        tp_size: int,
        rank: int,
        k_pool: Sequence[torch.Tensor],
        v_pool: Sequence[torch.Tensor],
        tp_group: Any = None,
        config_file: str | None = None,
        **_later: Any,
    ) -> None:
        """Args:
        sgl_config: SGLang's ``ModelConfig``.
        rank: in the tensor-parallel group.
        k_pool, v_pool: one tensor a layer, ``[slots, heads, dim]``.
        tp_group: torch ``ProcessGroup`` or SGLang's ``GroupCoordinator``; None for one rank.
        config_file: YAML file to read instead of the one that ``LMCACHE_CONFIG_FILE`` names.
        _later: what later versions of SGLang may add.

        Raises:
            ValueError: the configuration is wrong; the message names the key, the value and where it came from.
        """
        super().__init__(sgl_config, tp_size, rank, k_pool, v_pool, tp_group=tp_group, config_file=config_file)

    @never_raise(lambda: 0)
    def load_kv(self, load_metadata: LoadMetadata) -> int:
        """Fill the slots that are not −1, as far as their KV is held.

        Returns:
            The number of tokens from ``offset`` on that are in their slots now, those with slot −1 included; 0 when
            there is nothing new.
        """
        return 0 if self._cache is None else self._cache.load(load_metadata)

    @never_raise(lambda: None)
    def store_kv(self, store_metadata: StoreMetadata) -> None:
        """Keep the KV of a request; its slots may be reused when this returns."""
        if self._cache is not None:
            self._cache.store(store_metadata)


class LMCacheLayerwiseConnector(LMCacheConnector):
    """The same, as SGLang calls it around each forward."""

    @cached_property
    def _stored_nodes(self) -> StoredNodes:
        return StoredNodes(self)

    @never_raise(lambda: 0)
    def global_min_tokens(self, local_tokens: int, tp_group: Any, device: torch.device) -> int:
        """The smallest ``local_tokens`` of all ranks; every rank must call it."""
        return min_over_ranks(local_tokens, (tp_group,), device)

    def start_load_kv(self, load_metadata: LoadMetadata) -> int:
        """:meth:`load_kv`. Every layer is in its slots when this returns: see :class:`PoolCache` for why."""
        self._unlock_stored()
        return self.load_kv(load_metadata)

    @never_raise(lambda: None)
    def _unlock_stored(self) -> None:
        self._stored_nodes.unlock()

    def load_kv_layerwise(self, layer_id: int) -> None:
        """Nothing is left to do. SGLang calls this whenever a layer reads its pool, in decodes too."""
