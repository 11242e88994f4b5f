"""Which weights these are: what keeps KV of two models, adapters or tenants apart."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from blake3 import blake3

from lmcache.integration.config_digest import config_digest
from lmcache.metadata import LMCacheEngineMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def fingerprint(path: Path) -> str:
    """Digest of the weights in a local folder (or one file): names, sizes and 16 evenly spaced samples of each file.

    Reading all of a 100 GB model at start is no option; some sample changing with retrained weights is certain enough,
    and unlike the modification time it is the same on every host.
    """
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    stats = [file.stat() for file in files]
    return _digest(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)))


@lru_cache(maxsize=1024)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = blake3()
    for file, size, _ in files:
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest(16)


def _revision(model: str, revision: str | None, hf_config: Any) -> str:
    path = Path(model)
    if path.exists():
        return fingerprint(path)
    return str(getattr(hf_config, "_commit_hash", None) or revision or "")


def engine_metadata(vllm_config: VllmConfig, chunk_size: int) -> LMCacheEngineMetadata:
    """The identity and KV shape of this process's shard, as vLLM's configuration tells them."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    text_config = model.hf_text_config
    use_mla = bool(getattr(model, "use_mla", False))
    kv_dtype = model.dtype if cache.cache_dtype in ("auto", str(model.dtype).removeprefix("torch.")) else torch.uint8
    return LMCacheEngineMetadata(
        model_name=Path(model.model).name if Path(model.model).exists() else model.model,
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
        revision=_revision(model.model, model.revision, text_config),
        model_config=config_digest(
            {
                **text_config.to_dict(),
                "model_dtype": str(model.dtype),
                "quantization": str(model.quantization),
                "cache_dtype": str(cache.cache_dtype),
            }
        ),
        tp_rank=parallel.rank % parallel.tensor_parallel_size,
        tp_size=parallel.tensor_parallel_size,
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
