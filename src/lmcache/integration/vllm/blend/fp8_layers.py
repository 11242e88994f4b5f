"""vLLM's fp8 KV: which of it can be blended, and what the numbers in its pages stand for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.platforms import current_platform

from lmcache.blend.fp8_pages import FP8_DTYPES, Fp8Pages
from lmcache.integration.blend.model import UnsupportedModelError
from lmcache.integration.vllm.attention_writer import AttentionWriter
from lmcache.paging.paged_connector import PagedConnector

_NAMES = ("fp8", "fp8_e4m3", "fp8_e5m2")
# Both types have them, under other codes.
_NUMBERS = torch.tensor([1.5, -3.0, 0.5, 6.0, -1.0, 2.0, -4.0])


def reason_against(layer: Any) -> str | None:
    """Of an attention layer that keeps its KV in another type than it computes in."""
    kept = f"computes in {layer.dtype} and keeps its KV as {layer.kv_cache_dtype}"
    if layer.kv_cache_dtype not in _NAMES:
        return kept
    if not current_platform.is_cuda():
        return f"{kept}, which is blended on NVIDIA GPUs only"
    if getattr(layer, "calculate_kv_scales", False):  # gone in vLLM 0.32
        return f"{kept}, by scales that it takes from the first prompt"
    if any(scale.numel() != 1 for scale in (layer._q_scale, layer._k_scale, layer._v_scale)):
        return f"{kept}, each head by scales of its own"
    return None


def fp8_pages(
    model: nn.Module, layers: Sequence[Any], connector: PagedConnector, writer: AttentionWriter
) -> Fp8Pages | None:
    """What the pages of ``layers`` hold; None for real numbers.

    Which fp8 it is, and that the scales are those that vLLM goes by, is proved by a token that vLLM writes; its slot
    gets back what it held. The name does not tell: TRITON_ATTN keeps e4m3 as "fp8_e5m2" too (vLLM 0.32).

    Raises:
        UnsupportedModelError: what vLLM writes is neither.
    """
    if layers[0].kv_cache_torch_dtype == layers[0].dtype:
        return None
    scales, computed, device = scales_of(layers), layers[0].dtype, connector.tensors[0].device
    if not writer.available:
        dtype = FP8_DTYPES[layers[0].kv_cache_dtype == "fp8_e5m2"]
        return Fp8Pages(dtype, scales, computed, device)
    shape = connector.kv_layout.num_heads, connector.kv_layout.head_dim
    numbers = _NUMBERS.repeat(shape[0] * shape[1])[: shape[0] * shape[1]].view(shape).to(device)
    written = [_written(connector, layer, writer, numbers, scales[layer], computed) for layer in range(len(layers))]
    for dtype in FP8_DTYPES:
        if all(torch.equal(plane.view(dtype).float(), numbers) for planes in written for plane in planes):
            return Fp8Pages(dtype, scales, computed, device)
    raise UnsupportedModelError(
        model, f"its pages in {layers[0].kv_cache_dtype} do not hold KV divided by their scales"
    )


def scales_of(layers: Iterable[Any]) -> tuple[tuple[float, float], ...]:
    """Of K and V, a layer. Weights that are loaded again bring their own."""
    return tuple((float(layer._k_scale_float), float(layer._v_scale_float)) for layer in layers)


def _written(
    connector: PagedConnector,
    layer: int,
    writer: AttentionWriter,
    numbers: torch.Tensor,
    scales: tuple[float, float],
    computed: torch.dtype,
) -> list[torch.Tensor]:
    """The bytes of K and V, ``[heads, dim]``, when ``numbers`` are to be stored."""
    layout = connector.kv_layout
    slots = torch.tensor([layout.num_slots - 1], device=numbers.device)
    planes = [plane.view(torch.uint8)[-1, -1] for plane in layout.plane_views(connector.tensors, layer)]
    held = [plane.clone() for plane in planes]
    k, v = ((numbers * scale).to(computed)[None] for scale in scales)
    try:
        writer(layer, k, v, slots)
        return [plane.clone() for plane in planes]
    finally:
        for plane, before in zip(planes, held, strict=True):
            plane.copy_(before)
