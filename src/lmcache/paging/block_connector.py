"""Chunks that are the engine's own pages, copied whole: for pages in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.paging.elements import same_size_word, stack_layers, widest_word
from lmcache.paging.layout import KVLayout
from lmcache.paging.paged_connector import PagedConnector
from lmcache.paging.token_copy import TokenIndex, read_tokens, slot_view, write_tokens


@dataclass(frozen=True)
class ChunkPlan:
    """How one chunk meets the engine's pages.

    Whole pages: page ``pages[i]`` of the chunk is block ``blocks[i]``. ``tokens`` are the others that have a slot.
    """

    pages: torch.Tensor
    blocks: torch.Tensor
    tokens: torch.Tensor


def plan_chunk(slots: torch.Tensor, block_size: int, *, fill_last_page: bool) -> ChunkPlan:
    """Find the pages of a chunk whose tokens stand in one block, in order, from its first slot on.

    ``fill_last_page`` takes a last page that the chunk's tokens do not fill for whole if that is all it lacks.
    """
    given: npt.NDArray[np.int64] = slots.numpy()
    grid = np.full((-(-len(given) // block_size), block_size), -1, dtype=np.int64)
    grid.reshape(-1)[: len(given)] = given
    first = grid[:, 0]
    in_order = grid == first[:, None] + np.arange(block_size)
    if fill_last_page and (missing := grid.size - len(given)):
        in_order[-1, -missing:] = True
    whole = in_order.all(axis=1) & (first >= 0) & (first % block_size == 0)
    single = (grid >= 0) & ~whole[:, None]
    return ChunkPlan(
        pages=torch.from_numpy(whole.nonzero()[0]),
        blocks=torch.from_numpy(first[whole] // block_size),
        tokens=torch.from_numpy(single.reshape(-1).nonzero()[0]),
    )


def put_pages(pages: torch.Tensor, blocks: torch.Tensor, values: torch.Tensor) -> None:
    """``pages[:, blocks] = values`` for ``[l, blocks, words]`` on the CPU, at the speed of memory.

    On one thread numpy copies each page with ``memcpy``, where torch moves a word at a time (about 80 % as fast). With
    more threads torch divides the work; numpy does not.
    """
    if torch.get_num_threads() == 1:
        pages.numpy()[:, blocks.numpy()] = values.numpy()
    else:
        pages[:, blocks] = values


class BlockConnector(PagedConnector):
    """A chunk is ``[layers, pages, page]``: the bytes of whole pages as the engine laid them out.

    Whole pages are copied whole, single tokens one by one: those of a page that the range begins or ends in the midst
    of, or that holds tokens with slot −1. No byte outside of the given slots changes, in pages; in a chunk, what
    follows the last token is undefined.

    Packed pages cannot be taken apart. A last page that the range does not fill is written whole all the same (the
    rest of it belongs to the same request and is not computed yet). Any other part of a page is refused with
    ValueError: leaving it out in silence would let the engine attend to what happens to be there.
    """

    def __init__(self, kv_layout: KVLayout, tensors: Sequence[torch.Tensor]) -> None:
        """Raises:
        ValueError: a block is not one dense run of memory, or the pages are not on the CPU.
        """
        super().__init__(kv_layout, tensors)
        if tensors[0].device.type != "cpu":
            raise ValueError(f"whole pages are kept for pages on the CPU only, these are on {tensors[0].device}")
        views = [kv_layout.page_view(tensors, layer) for layer in self._all_layers]
        self._page_numel = views[0].shape[1]
        self._word = widest_word(views)
        self._pages = [view.view(self._word) for view in views]
        self._stacked = stack_layers(self._pages)
        self._planes = [kv_layout.plane_views(tensors, layer) for layer in self._all_layers]

    @property
    def layout(self) -> str:
        return self.kv_layout.page_tag

    def spec(self, num_tokens: int) -> KVSpec:
        pages = -(-num_tokens // self.kv_layout.block_size)
        shape = (self.num_layers, pages, self._page_numel)
        return KVSpec(shape, self.kv_layout.dtype, self.layout, num_tokens)

    def chunk_views(self, obj: MemoryObj) -> tuple[torch.Tensor, ...]:
        return self.kv_layout.chunk_plane_views(obj.tensor)

    def _check_ranges(self, slots: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        for start, end in ranges:  # each for itself: its pages may have to be whole
            self._check_slots(slots[start:end])

    def _check_slots(self, slots: torch.Tensor) -> None:
        super()._check_slots(slots)
        if self.kv_layout.packed and len(self._plan(slots, fill_last_page=True).tokens):
            raise ValueError(
                f"layout {self.kv_layout.name!r} packs its pages of {self.kv_layout.block_size} tokens: "
                "a chunk must begin at a page, and each page be given whole or not at all"
            )

    def _plan(self, slots: torch.Tensor, *, fill_last_page: bool) -> ChunkPlan:
        return plan_chunk(slots, self.kv_layout.block_size, fill_last_page=fill_last_page)

    def _gather(self, obj: MemoryObj, slots: torch.Tensor, layers: range) -> None:
        plan = self._plan(slots, fill_last_page=True)
        for kept, pages in self._page_pairs(obj, layers):
            if len(plan.pages) == kept.shape[1]:
                torch.index_select(pages, 1, plan.blocks, out=kept)
            elif len(plan.pages):
                kept[:, plan.pages] = pages[:, plan.blocks]
        self._copy_tokens(obj, slots, plan.tokens, layers, to_pages=False)

    def _scatter(self, obj: MemoryObj, slots: torch.Tensor, layers: range) -> None:
        plan = self._plan(slots, fill_last_page=self.kv_layout.packed)
        for kept, pages in self._page_pairs(obj, layers):
            if len(plan.pages) == kept.shape[1]:
                put_pages(pages, plan.blocks, kept)
            elif len(plan.pages):
                put_pages(pages, plan.blocks, kept[:, plan.pages])
        self._copy_tokens(obj, slots, plan.tokens, layers, to_pages=True)

    def _page_pairs(self, obj: MemoryObj, layers: range) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``(chunk [l, pages, words], engine [l, blocks, words])`` for runs of layers that can be copied at once."""
        kept = obj.bytes.view(self._word).view(self.num_layers, obj.spec.shape[1], -1)
        if self._stacked is not None:
            some = slice(layers.start, layers.stop)
            return [(kept[some], self._stacked[some])]
        return [(kept[layer : layer + 1], self._pages[layer][None]) for layer in layers]

    def _copy_tokens(
        self, obj: MemoryObj, slots: torch.Tensor, tokens: torch.Tensor, layers: range, *, to_pages: bool
    ) -> None:
        if not len(tokens):
            return
        in_pages = TokenIndex(slots[tokens], self.kv_layout.block_size, slots.device)
        in_chunk = TokenIndex(tokens, self.kv_layout.block_size, slots.device)
        word = same_size_word(self.kv_layout.dtype)
        chunk = self.chunk_views(obj)
        for layer in layers:
            for plane, kept in zip(self._planes[layer], chunk, strict=True):
                engine, host = slot_view(plane.view(word)), slot_view(kept[layer].view(word))
                if to_pages:
                    write_tokens(engine, in_pages, read_tokens(host, in_chunk))
                else:
                    write_tokens(host, in_chunk, read_tokens(engine, in_pages))
