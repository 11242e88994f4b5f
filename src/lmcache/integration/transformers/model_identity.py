"""Which model in memory this is: what keeps the KV of two models apart."""

from __future__ import annotations

from typing import Any

import torch
from blake3 import blake3

from lmcache.integration.config_digest import config_digest
from lmcache.metadata import LMCacheEngineMetadata

_SAMPLES = 1024


def engine_metadata(model: Any, chunk_size: int) -> LMCacheEngineMetadata:
    """The identity and KV shape of a transformers model, for an engine that is to hold its KV.

    The weights in memory count, not the folder that they came from: a model that was trained further, or that an
    adapter was merged into, is another one. Equal weights have equal identities in all processes.
    """
    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return LMCacheEngineMetadata(
        model_name=type(model).__name__,
        kv_dtype=model.dtype,
        kv_shape=(config.num_hidden_layers, 2, chunk_size, kv_heads, head_dim),
        revision=weights_digest(model),
        model_config=config_digest(model.config.to_dict()),
    )


def weights_digest(model: torch.nn.Module) -> str:
    """Digest of names, shapes, types and up to 1,024 evenly spaced elements of each parameter.

    Reading all of a large model takes long; that none of so many samples changes with retrained weights is certain
    enough.
    """
    digest = blake3()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}:{parameter.dtype}:{list(parameter.shape)};".encode())
        flat = parameter.detach().flatten()
        samples = flat[:: max(1, len(flat) // _SAMPLES)].cpu().contiguous()
        digest.update(samples.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(16)
