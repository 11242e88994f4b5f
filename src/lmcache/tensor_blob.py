"""KV as the tensor path passes it: one blob or (k, v) per layer, in vLLM's or Hugging Face's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from lmcache.metadata import LMCacheEngineMetadata

KVBlob: TypeAlias = torch.Tensor
KVLayers: TypeAlias = "Sequence[tuple[torch.Tensor, torch.Tensor]]"
KVLike: TypeAlias = "KVBlob | KVLayers"


def token_major_views(kv: KVLike, num_tokens: int, metadata: LMCacheEngineMetadata) -> list[torch.Tensor]:
    """``kv`` as views ``[layers, planes, T, H, D]`` that together cover all layers in order; nothing is copied.

    A blob gives one view; per-layer tensors give views of one layer and one plane each.

    Raises:
        ValueError: a shape, the dtype or the number of layers is not what ``metadata`` says.
    """
    layers, planes, _, heads, dim = metadata.kv_shape
    huggingface = metadata.fmt == "huggingface"
    plane_shape = (heads, num_tokens, dim) if huggingface else (num_tokens, heads, dim)
    if isinstance(kv, torch.Tensor):
        _check(kv, (layers, planes, *plane_shape), metadata, "kv")
        return [kv.transpose(2, 3) if huggingface else kv]
    if len(kv) != layers:
        raise ValueError(f"kv has {len(kv)} layers, the model has {layers}")
    views = []
    for index, pair in enumerate(kv):
        for name, plane in zip(("k", "v"), pair[:planes], strict=False):
            _check(plane, plane_shape, metadata, f"{name} of layer {index}")
            views.append((plane.transpose(0, 1) if huggingface else plane)[None, None])
    return views


def copy_tokens(views: Sequence[torch.Tensor], start: int, end: int, chunk: torch.Tensor) -> None:
    """Tokens ``[start, end)`` of ``views`` → ``chunk: [L, planes, end − start, H, D]``."""
    if len(views) == 1:
        chunk.copy_(views[0][:, :, start:end])
        return
    planes = chunk.flatten(0, 1)
    for index, view in enumerate(views):
        planes[index].copy_(view[0, 0, start:end])


def in_format(blob: torch.Tensor, metadata: LMCacheEngineMetadata, return_tuple: bool) -> KVLike:
    """``blob: [L, planes, T, H, D]`` in the metadata's format, whole or as (k, v) per layer (views of it).

    For MLA, which has one plane, k and v of a pair are the same tensor.
    """
    shaped = blob.transpose(2, 3) if metadata.fmt == "huggingface" else blob
    return tuple((layer[0], layer[-1]) for layer in shaped) if return_tuple else shaped


def _check(tensor: torch.Tensor, shape: tuple[int, ...], metadata: LMCacheEngineMetadata, name: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {shape} for {metadata.fmt!r} format and these tokens"
        )
    if tensor.dtype != metadata.kv_dtype:
        raise ValueError(f"{name} is {tensor.dtype}, the cache holds {metadata.kv_dtype}")
