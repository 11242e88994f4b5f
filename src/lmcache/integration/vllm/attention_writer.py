"""Writing KV through vLLM's own attention layers, to prove that we read its pages right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class AttentionWriter:
    """``writer(layer, k, v, slots)`` puts ``k, v: [T, H, D]`` into the pages of the registered layer ``layer``."""

    def __init__(self, vllm_config: VllmConfig, layer_names: list[str]) -> None:
        modules: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        self._layers = [modules[name] for name in layer_names]

    @property
    def backend(self) -> str:
        """Name of the attention backend, such as ``CPU_ATTN`` or ``FLASH_ATTN``."""
        backend = getattr(self._layers[0], "attn_backend", None)
        return str(backend.get_name()) if backend is not None else type(self._layers[0]).__name__

    @property
    def available(self) -> bool:
        """Whether this backend offers the call (MLA and some others write elsewhere)."""
        return all(hasattr(getattr(layer, "impl", None), "do_kv_cache_update") for layer in self._layers)

    def __call__(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        attention = self._layers[layer]
        pages = attention.kv_cache
        if isinstance(pages, list):  # one per virtual engine up to vLLM 0.25
            pages = pages[0]
        attention.impl.do_kv_cache_update(attention, k, v, pages, slots)
