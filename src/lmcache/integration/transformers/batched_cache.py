"""Caches of several prompts as one, so that their answers are generated together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def batched_cache(caches: Sequence[DynamicCache], room: int) -> DynamicCache:
    """One cache with the rows of all ``caches``, which hold one prompt each, all of the same length.

    Reading the weights once for several answers is faster. But a transformers layer copies all it holds for each new
    token, which for many rows costs more than that gains; so layers with full attention get ``room`` for so many more
    tokens. ``caches`` are used up.
    """
    whole = caches[0]
    for layer_id, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys = torch.cat([layer.keys for layer in layers])
        values = torch.cat([layer.values for layer in layers])
        if type(layers[0]) is DynamicLayer:
            whole.layers[layer_id] = _RoomyLayer(keys, values, room)
        else:  # of a sliding window: small
            layers[0].keys, layers[0].values = keys, values
        for layer in layers[1:]:
            layer.keys = layer.values = None
    return whole


class _RoomyLayer(DynamicLayer):
    """``keys`` and ``values`` (``[rows, kv_heads, tokens, dim]``) are the filled part of larger tensors."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._all_keys, self._all_values = (_with_room(tensor, room) for tensor in (keys, values))
        self.keys, self.values = self._filled(keys.shape[2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._all_keys.shape[2]:
            raise IndexError(f"the cache has room for {self._all_keys.shape[2]} tokens, got {end}")
        self._all_keys[:, :, start:end] = key_states
        self._all_values[:, :, start:end] = value_states
        self.keys, self.values = self._filled(end)
        return self.keys, self.values

    def _filled(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._all_keys[:, :, :tokens], self._all_values[:, :, :tokens]


def _with_room(tensor: torch.Tensor, room: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, room))
