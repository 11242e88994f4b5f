"""What every connector does alike: check its arguments, then move one chunk after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch

from lmcache.memory.memory_obj import MemoryObj
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.paging.layout import KVLayout
from lmcache.paging.token_copy import TokenIndex, read_tokens, slot_view, write_tokens


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Consecutive ``ranges`` as one each."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


class PagedConnector(GPUConnectorInterface):
    """Moves KV between ``tensors``, which lie as ``kv_layout`` says, and chunks.

    Every method raises ValueError, before a byte is moved, for a chunk that is not of the range's spec, a range
    outside of the slot mapping, or a slot outside of the pages. A ``slot_mapping`` on another device than the CPU is
    copied there first, which waits for that device.
    """

    def __init__(self, kv_layout: KVLayout, tensors: Sequence[torch.Tensor]) -> None:
        self.kv_layout = kv_layout
        self.tensors = list(tensors)
        self._all_layers = range(kv_layout.num_layers)

    @property
    def num_layers(self) -> int:
        return self.kv_layout.num_layers

    def warm_up(self) -> None:
        """Do what would make the first call slow. No page is touched."""

    @cached_property
    def planes(self) -> list[tuple[torch.Tensor, ...]]:
        """:meth:`KVLayout.plane_views` of each layer."""
        return [self.kv_layout.plane_views(self.tensors, layer) for layer in self._all_layers]

    @cached_property
    def layer_distances(self) -> tuple[int, ...] | None:
        """How far the pages of each layer lie behind those of the first, in elements; None where that is not the same
        for K and V, or no whole number."""
        apart: list[int] = []
        first = self.planes[0]
        for planes in self.planes:
            nbytes = {plane.data_ptr() - start.data_ptr() for plane, start in zip(planes, first, strict=True)}
            distance, rest = divmod(min(nbytes), first[0].element_size())
            if len(nbytes) > 1 or rest:
                return None
            apart.append(distance)
        return tuple(apart)

    @cached_property
    def distances_on_device(self) -> torch.Tensor | None:
        """:attr:`layer_distances`, int64 ``[layers]``."""
        if self.layer_distances is None:
            return None
        return torch.tensor(self.layer_distances, device=self.tensors[0].device)

    @abstractmethod
    def chunk_views(self, obj: MemoryObj) -> tuple[torch.Tensor, ...]:
        """K and V (only the latent for MLA) of a chunk, each a view ``[layers, blocks, tokens per block, heads, dim]``.

        Token ``t`` of the chunk is at ``[:, t // n, t % n]`` for ``n`` tokens per block; what follows the chunk's last
        token is undefined.

        Raises:
            ValueError: the pages are packed.
        """

    def token_index(self, slots: torch.Tensor) -> TokenIndex:
        """``slots`` (int64 ``[T]`` on the CPU, none negative) for :meth:`read_tokens` and :meth:`write_tokens`.

        Raises:
            ValueError: a slot lies outside of the pages.
        """
        self._check_slots(slots)
        return TokenIndex(slots, self.kv_layout.block_size, self.tensors[0].device)

    def read_tokens(self, layer: int, index: TokenIndex) -> tuple[torch.Tensor, ...]:
        """K and V (only the latent for MLA) of some tokens in one layer, each ``[T, heads, dim]``.

        Raises:
            ValueError: the pages are packed.
        """
        return tuple(read_tokens(slot_view(plane), index) for plane in self._layer_planes(layer))

    def write_tokens(self, layer: int, index: TokenIndex, planes: Sequence[torch.Tensor]) -> None:
        """The reverse of :meth:`read_tokens`."""
        for plane, values in zip(self._layer_planes(layer), planes, strict=True):
            write_tokens(slot_view(plane), index, values)

    def _layer_planes(self, layer: int) -> tuple[torch.Tensor, ...]:
        if self.kv_layout.packed:
            raise ValueError(f"layout {self.kv_layout.name!r} packs its pages: single tokens cannot be moved")
        self._one_layer(layer)
        return self.planes[layer]

    @abstractmethod
    def _gather(self, obj: MemoryObj, slots: torch.Tensor, layers: range) -> None:
        """Pages → ``obj``; ``slots`` int64 on the CPU, one a token of the chunk."""

    @abstractmethod
    def _scatter(self, obj: MemoryObj, slots: torch.Tensor, layers: range) -> None:
        """``obj`` → pages."""

    def _check_ranges(self, slots: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        """:meth:`_check_slots` of the tokens in ``ranges``; consecutive ones need not be looked at one by one."""
        for start, end in _joined(ranges):
            self._check_slots(slots[start:end])

    def _check_slots(self, slots: torch.Tensor) -> None:
        """Raise ValueError for slots that this connector cannot serve."""
        low, high = (int(slot) for slot in torch.aminmax(slots))
        if low < -1 or high >= self.kv_layout.num_slots:
            raise ValueError(f"slots must be −1 or in 0 … {self.kv_layout.num_slots - 1}, got {low} … {high}")

    def batched_from_gpu(
        self, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]], slot_mapping: torch.Tensor
    ) -> None:
        self._move(False, self._all_layers, objs, ranges, slot_mapping)

    def batched_to_gpu(
        self, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]], slot_mapping: torch.Tensor
    ) -> None:
        self._move(True, self._all_layers, objs, ranges, slot_mapping)

    def layer_from_gpu(
        self,
        layer: int,
        objs: Sequence[MemoryObj],
        ranges: Sequence[tuple[int, int]],
        slot_mapping: torch.Tensor,
    ) -> None:
        self._move(False, self._one_layer(layer), objs, ranges, slot_mapping)

    def layer_to_gpu(
        self,
        layer: int,
        objs: Sequence[MemoryObj],
        ranges: Sequence[tuple[int, int]],
        slot_mapping: torch.Tensor,
    ) -> None:
        self._move(True, self._one_layer(layer), objs, ranges, slot_mapping)

    def _one_layer(self, layer: int) -> range:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} of {self.num_layers}")
        return range(layer, layer + 1)

    def _move(
        self,
        to_pages: bool,
        layers: range,
        objs: Sequence[MemoryObj],
        ranges: Sequence[tuple[int, int]],
        slot_mapping: torch.Tensor,
    ) -> None:
        if len(objs) != len(ranges):
            raise ValueError(f"{len(objs)} chunks for {len(ranges)} ranges")
        mapping = slot_mapping.to(device="cpu", dtype=torch.int64)
        num_tokens = len(mapping)
        for obj, (start, end) in zip(objs, ranges, strict=True):
            if not 0 <= start < end <= num_tokens:
                raise ValueError(f"range [{start}, {end}) does not lie in a slot mapping of {num_tokens} tokens")
            if (wanted := self.spec(end - start)) is not obj.spec and obj.spec != wanted:
                raise ValueError(f"chunk of {obj.spec} for tokens [{start}, {end}), which need {wanted}")
        self._check_ranges(mapping, ranges)
        self._move_checked(to_pages, layers, objs, ranges, mapping)

    def _move_checked(
        self,
        to_pages: bool,
        layers: range,
        objs: Sequence[MemoryObj],
        ranges: Sequence[tuple[int, int]],
        slots: torch.Tensor,
    ) -> None:
        move = self._scatter if to_pages else self._gather
        for obj, (start, end) in zip(objs, ranges, strict=True):
            move(obj, slots[start:end], layers)
