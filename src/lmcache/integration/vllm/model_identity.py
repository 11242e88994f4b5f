"""Which weights these are: what keeps KV of two models, adapters or tenants apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from lmcache.integration.model_identity import fingerprint, model_identity
from lmcache.keys import Shard
from lmcache.metadata import LMCacheEngineMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request


def engine_metadata(vllm_config: VllmConfig, chunk_size: int) -> LMCacheEngineMetadata:
    """The identity and KV shape of this process's shard, as vLLM's configuration tells them."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    use_mla = bool(getattr(model, "use_mla", False))
    kv_dtype = model.dtype if cache.cache_dtype in ("auto", str(model.dtype).removeprefix("torch.")) else torch.uint8
    overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else {"function": repr(model.hf_overrides)}
    if kv_dtype is torch.uint8:
        overrides = {**overrides, "cache_dtype": str(cache.cache_dtype)}
    identity = model_identity(
        model.model,
        model.revision,
        model.hf_text_config,
        overrides=overrides,
        dtype=model.dtype,
        kv_dtype=kv_dtype,
        quantization=model.quantization,
    )
    shard = Shard.of_heads(
        parallel.rank % parallel.tensor_parallel_size,
        parallel.tensor_parallel_size,
        1 if use_mla else model.get_total_num_kv_heads(),
    )
    return LMCacheEngineMetadata(
        **identity._asdict(),
        world_size=parallel.world_size,
        worker_id=parallel.rank,
        kv_dtype=kv_dtype,
        kv_shape=(
            model.get_num_layers(parallel),
            1 if use_mla else 2,
            chunk_size,
            1 if use_mla else model.get_num_kv_heads(parallel),
            model.get_head_size(),
        ),
        use_mla=use_mla,
        tp_rank=shard.tp_rank,
        tp_size=shard.tp_size,
        pp_rank=parallel.rank // parallel.tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
    )


def lora_identity(lora: LoRARequest | None) -> str:
    """Name and weights of an adapter; empty without one."""
    if lora is None:
        return ""
    path = Path(lora.lora_path)
    return f"{lora.lora_name}:{fingerprint(path) if path.exists() else lora.lora_path}"


def tenant_salt(request: Request) -> str:
    """The request's ``cache_salt``, and what stands behind the placeholder tokens of images and audio.

    Two prompts with equal tokens but other pictures must not meet. (The whole prompt is set apart, also its text
    before the first picture.)
    """
    pictures = [
        (f.identifier, f.mm_position.offset, f.mm_position.length) for f in getattr(request, "mm_features", None) or ()
    ]
    if not pictures:
        return request.cache_salt or ""
    return msgspec.json.encode([request.cache_salt, pictures]).decode()
