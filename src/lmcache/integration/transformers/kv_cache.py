"""Blended KV as a cache that ``model.generate`` goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache


def generation_cache(config: Any, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> DynamicCache:
    """A cache of all tokens but the last, which ``generate`` computes itself.

    Args:
        config: of the model; decides which layers keep only their sliding window.
        keys: ``[N, kv_heads, dim]`` a layer; ``values`` likewise. They are copied.
    """
    cache = DynamicCache(config=config)
    if len(keys[0]) > 1:
        for layer, kv in enumerate(zip(keys, values, strict=True)):
            k, v = (tensor[:-1].transpose(0, 1)[None] for tensor in kv)  # [1, kv_heads, N - 1, dim]
            cache.update(k, v, layer)
    return cache
