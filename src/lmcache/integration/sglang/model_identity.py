"""Stand-in until the core of generation C is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmcache.integration.config_digest import config_digest
from lmcache.metadata import LMCacheEngineMetadata


def engine_metadata(
    model_config: Any,
    *,
    tp_size: int,
    tp_rank: int,
    pp_size: int = 1,
    pp_rank: int = 0,
    kv_dtype: torch.dtype,
    chunk_size: int,
) -> LMCacheEngineMetadata:
    return LMCacheEngineMetadata(
        model_name=Path(model_config.model_path).name,
        world_size=tp_size * pp_size,
        worker_id=tp_rank,
        kv_dtype=kv_dtype,
        kv_shape=(
            model_config.num_hidden_layers,
            2,
            chunk_size,
            model_config.get_num_kv_heads(tp_size),
            model_config.head_dim,
        ),
        model_config=config_digest(model_config.hf_text_config.to_dict()),
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
    )
