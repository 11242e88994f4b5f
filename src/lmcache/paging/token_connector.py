"""Chunks that are token-major: every strided layout, on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.paging.elements import widest_word
from lmcache.paging.layout import KVLayout
from lmcache.paging.paged_connector import PagedConnector
from lmcache.paging.token_copy import TokenIndex, read_tokens, slot_view, write_tokens

_KEPT_SPECS = 1024


class TokenConnector(PagedConnector):
    """A chunk is ``[layers, planes, tokens, heads, dim]``. Ranges may begin anywhere.

    When tokens are gathered whose slot is −1, their place in the chunk stays as it was.
    """

    def __init__(self, kv_layout: KVLayout, tensors: Sequence[torch.Tensor]) -> None:
        """Raises:
        ValueError: the layout packs its pages, so that tokens cannot be moved one by one.
        """
        if kv_layout.packed:
            raise ValueError(f"layout {kv_layout.name!r} packs its pages: only whole pages can be moved")
        super().__init__(kv_layout, tensors)
        layers = [kv_layout.plane_views(tensors, layer) for layer in self._all_layers]
        self._word = widest_word([plane for planes in layers for plane in planes])
        self._planes = [[slot_view(plane.view(self._word)) for plane in planes] for planes in layers]
        self._device = layers[0][0].device
        self._specs: dict[int, KVSpec] = {}

    @property
    def layout(self) -> str:
        return TOKEN_MAJOR

    def spec(self, num_tokens: int) -> KVSpec:
        held = self._specs.get(num_tokens)
        if held is None:
            at = self.kv_layout
            shape = (at.num_layers, len(at.planes), num_tokens, at.num_heads, at.head_dim)
            held = KVSpec(shape, at.dtype, TOKEN_MAJOR, num_tokens)
            if len(self._specs) < _KEPT_SPECS:
                self._specs[num_tokens] = held
        return held

    def chunk_views(self, obj: MemoryObj) -> tuple[torch.Tensor, ...]:
        return obj.tensor.unsqueeze(2).unbind(1)

    def _gather(self, obj: MemoryObj, slots: torch.Tensor, layers: range) -> None:
        self._copy(obj, slots, layers, to_pages=False)

    def _scatter(self, obj: MemoryObj, slots: torch.Tensor, layers: range) -> None:
        self._copy(obj, slots, layers, to_pages=True)

    def _copy(self, obj: MemoryObj, slots: torch.Tensor, layers: range, *, to_pages: bool) -> None:
        tokens = (slots >= 0).nonzero().squeeze(1)
        if not len(tokens):
            return
        in_pages = TokenIndex(slots[tokens], self.kv_layout.block_size, self._device)
        in_chunk = TokenIndex(tokens, len(slots), obj.bytes.device)
        *outer, dim = obj.spec.shape
        words = dim * obj.spec.dtype.itemsize // self._word.itemsize
        chunk = obj.bytes.view(self._word).view(*outer, words)
        for layer in layers:
            for plane, kept in zip(self._planes[layer], chunk[layer], strict=True):
                if to_pages:
                    write_tokens(plane, in_pages, read_tokens(kept, in_chunk))
                else:
                    write_tokens(kept, in_chunk, read_tokens(plane, in_pages))
