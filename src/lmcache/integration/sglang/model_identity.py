"""Which weights and which share of them SGLang holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmcache.integration.config_digest import config_digest
from lmcache.integration.sglang import server_settings
from lmcache.integration.vllm.model_identity import fingerprint
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
    """The identity and KV shape of one rank of ``model_config``, SGLang's ``ModelConfig``."""
    path = Path(model_config.model_path)
    local = path.exists()
    return LMCacheEngineMetadata(
        model_name=path.name if local else str(model_config.model_path),
        world_size=tp_size * pp_size,
        worker_id=pp_rank * tp_size + tp_rank,
        kv_dtype=kv_dtype,
        kv_shape=(
            model_config.num_hidden_layers // pp_size,
            2,
            chunk_size,
            model_config.get_num_kv_heads(tp_size),
            model_config.head_dim,
        ),
        revision=fingerprint(path) if local else str(model_config.revision or ""),
        model_config=config_digest(
            {
                **model_config.hf_text_config.to_dict(),
                "model_dtype": str(model_config.dtype),
                "quantization": str(model_config.quantization),
                **server_settings.chosen(("kv_cache_dtype", "json_model_override_args")),
            }
        ),
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
    )
