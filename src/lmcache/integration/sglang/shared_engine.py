"""The engine of one SGLang rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmcache.config import LMCacheEngineConfig
from lmcache.integration.sglang.kv_pools import pools_connector
from lmcache.integration.sglang.model_identity import engine_metadata
from lmcache.manager import LMCacheManager
from lmcache.observability.logging import init_logger
from lmcache.paging.detect import UnknownLayoutError

logger = init_logger(__name__)


class UnsupportedSetupError(RuntimeError):
    """This SGLang is set up in a way that the cache cannot serve."""


@dataclass(frozen=True)
class RankOf:
    """Where this process stands among those that hold a model together."""

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0

    @property
    def number(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def alone(self) -> bool:
        return self.tp_size * self.pp_size == 1


def load_config(config_file: str | None, rank: RankOf) -> LMCacheEngineConfig:
    """From ``config_file`` (SGLang's ``--lmcache-config-file``), else ``LMCACHE_CONFIG_FILE``, and the environment.

    Ranks have a folder of the disk tier each: it belongs to one process.

    Raises:
        ValueError: the configuration is wrong; the message names the key, the value and where it came from.
    """
    environ = dict(os.environ)
    if config_file:
        environ["LMCACHE_CONFIG_FILE"] = config_file
    config = LMCacheEngineConfig.load(environ=environ)
    if rank.alone or config.local_disk is None:
        return config
    return config.model_copy(update={"local_disk": Path(config.local_disk) / f"rank-{rank.number}"})


def build(
    model_config: Any,
    k_pool: Sequence[torch.Tensor],
    v_pool: Sequence[torch.Tensor] | None,
    *,
    rank: RankOf,
    kv_dtype: torch.dtype,
    page_size: int = 1,
    config_file: str | None = None,
) -> LMCacheManager:
    """Raises:
    ValueError: the configuration is wrong, or cannot work with this SGLang.
    UnsupportedSetupError: the pools are of a form that is not known.
    """
    config = load_config(config_file, rank)
    try:
        connector = pools_connector(k_pool, v_pool, page_size)
    except UnknownLayoutError as error:
        raise UnsupportedSetupError(str(error)) from error
    metadata = engine_metadata(
        model_config,
        k_pool,
        use_mla=v_pool is None,
        tp_size=rank.tp_size,
        tp_rank=rank.tp_rank,
        pp_size=rank.pp_size,
        pp_rank=rank.pp_rank,
        kv_dtype=kv_dtype,
        chunk_size=config.chunk_size,
    )
    logger.info(
        "KV pools: %s, %d layers, chunks of %d tokens", connector.kv_layout.name, len(k_pool), config.chunk_size
    )
    return LMCacheManager(config, metadata, connector)
