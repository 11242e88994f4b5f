"""Building the cache of one SGLang rank."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lmcache.config import LMCacheEngineConfig
from lmcache.config.sources import CONFIG_FILE_VARIABLE
from lmcache.integration.sglang.kv_pools import pools_connector
from lmcache.integration.sglang.model_identity import engine_metadata
from lmcache.manager import LMCacheManager
from lmcache.paging.detect import UnknownLayoutError


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
    """The manager of this rank, with a connector to its pools.

    Args:
        config_file: YAML file to read instead of the one that ``LMCACHE_CONFIG_FILE`` names.

    Raises:
        UnsupportedSetupError: the pools are not those of full attention over all of the model's layers.
        ValueError: the configuration is wrong (names the key, the value and where it came from).
    """
    environ = {**os.environ, CONFIG_FILE_VARIABLE: config_file} if config_file else os.environ
    config = LMCacheEngineConfig.load(environ=environ)
    if tp_size > 1:
        config = with_own_directory(config, {"tp": tp_rank})
    try:
        connector = pools_connector(k_pool, v_pool)
    except UnknownLayoutError as error:
        raise UnsupportedSetupError(str(error)) from None
    metadata = engine_metadata(
        model_config, tp_size=tp_size, tp_rank=tp_rank, kv_dtype=k_pool[0].dtype, chunk_size=config.chunk_size
    )
    layers, _, _, heads, dim = metadata.kv_shape
    found = (len(k_pool), *k_pool[0].shape[1:])
    if found != (layers, heads, dim):
        raise UnsupportedSetupError(
            f"the pools hold {found} layers, KV heads and dims, but the model's share of this rank is "
            f"{(layers, heads, dim)}: pipeline parallelism and attention data parallelism are not supported"
        )
    return LMCacheManager(config, metadata, connector)


def with_own_directory(config: LMCacheEngineConfig, ranks: Mapping[str, int]) -> LMCacheEngineConfig:
    """``config`` with a disk directory below ``local_disk`` that no other rank uses: each process needs its own."""
    if config.local_disk is None or not ranks:
        return config
    folder = config.local_disk / "-".join(f"{name}{rank}" for name, rank in ranks.items())
    return config.model_copy(update={"local_disk": folder})
