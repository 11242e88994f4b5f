"""Which model SGLang serves, and the shape of its KV in this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmcache.integration.model_identity import model_identity
from lmcache.metadata import LMCacheEngineMetadata


def engine_metadata(
    model_config: Any,
    k_pool: Sequence[torch.Tensor] | None = None,
    *,
    use_mla: bool = False,
    tp_size: int = 1,
    tp_rank: int = 0,
    pp_size: int = 1,
    pp_rank: int = 0,
    kv_dtype: torch.dtype,
    chunk_size: int,
) -> LMCacheEngineMetadata:
    """Args:
    model_config: SGLang's ``ModelConfig``.
    k_pool: ``[slots, heads, dim]`` a layer of this rank; None where there are no pools yet.
    kv_dtype: of the KV; the pools of 8-bit types are uint8.
    """
    overrides = dict(getattr(model_config, "model_override_args", None) or {})
    if kv_dtype.itemsize == 1:
        overrides["cache_dtype"] = str(kv_dtype)
    identity = model_identity(
        model_config.model_path,
        getattr(model_config, "revision", None),
        model_config.hf_text_config,
        overrides=overrides,
        dtype=model_config.dtype,
        kv_dtype=kv_dtype,
        quantization=getattr(model_config, "quantization", None),
    )
    if k_pool is not None:
        layers, (_, heads, dim), stored = len(k_pool), k_pool[0].shape, k_pool[0].dtype
    else:
        layers, heads, dim = (
            model_config.num_hidden_layers,
            model_config.get_num_kv_heads(tp_size),
            model_config.head_dim,
        )
        stored = torch.uint8 if kv_dtype.itemsize == 1 else kv_dtype
    return LMCacheEngineMetadata(
        **identity._asdict(),
        world_size=tp_size * pp_size,
        worker_id=pp_rank * tp_size + tp_rank,
        kv_dtype=stored,
        kv_shape=(layers, 1 if use_mla else 2, chunk_size, heads, dim),
        use_mla=use_mla,
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
    )
