"""Stand-in until the core of generation C is merged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from lmcache.config import LMCacheEngineConfig
from lmcache.integration.sglang.kv_pools import pools_connector
from lmcache.integration.sglang.model_identity import engine_metadata
from lmcache.manager import LMCacheManager


class UnsupportedSetupError(RuntimeError):
    """This SGLang is set up in a way that the cache cannot serve; it runs on without."""


def build(
    model_config: Any,
    k_pool: Sequence[torch.Tensor],
    v_pool: Sequence[torch.Tensor],
    *,
    tp_size: int,
    tp_rank: int,
    config_file: str | None = None,
) -> LMCacheManager:
    environ = dict(os.environ) | ({"LMCACHE_CONFIG_FILE": config_file} if config_file else {})
    config = LMCacheEngineConfig.load(environ=environ)
    metadata = engine_metadata(
        model_config, tp_size=tp_size, tp_rank=tp_rank, kv_dtype=k_pool[0].dtype, chunk_size=config.chunk_size
    )
    return LMCacheManager(config, metadata, pools_connector(k_pool, v_pool))
