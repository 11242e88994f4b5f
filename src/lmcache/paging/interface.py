"""How KV moves between an engine's pages and host memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from lmcache.memory.memory_obj import KVSpec, MemoryObj


class GPUConnectorInterface(ABC):
    """Copies tokens between an engine's paged KV and :class:`MemoryObj` chunks, on whatever device the pages lie.

    Ranges are in tokens of the request. ``slot_mapping`` is int64, one slot (``block * block_size + offset``) for
    each token of the request; −1 marks a token whose page must not be touched (it is already computed).
    """

    @property
    @abstractmethod
    def layout(self) -> str:
        """Tag and version of the host layout that :meth:`spec` gives; part of every key's namespace."""

    @property
    @abstractmethod
    def num_layers(self) -> int: ...

    @abstractmethod
    def spec(self, num_tokens: int) -> KVSpec:
        """What a chunk of ``num_tokens`` tokens looks like in host memory."""

    @abstractmethod
    def batched_from_gpu(
        self, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]], slot_mapping: torch.Tensor
    ) -> None:
        """Pages → memory. ``objs[i]`` receives the tokens ``[start, end)`` of ``ranges[i]``, every layer."""

    @abstractmethod
    def batched_to_gpu(
        self, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]], slot_mapping: torch.Tensor
    ) -> None:
        """Memory → pages, every layer. Tokens with slot −1 are left alone."""

    def send_ahead(  # noqa: B027 - who has no way to the pages that takes time need not do anything
        self, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]]
    ) -> None:
        """:meth:`batched_to_gpu` of these chunks is likely to come next: have their bytes on the way, as far as that
        costs nobody anything. The chunks may be given back before that call, which then never comes. Never waits.
        """

    @abstractmethod
    def layer_from_gpu(
        self,
        layer: int,
        objs: Sequence[MemoryObj],
        ranges: Sequence[tuple[int, int]],
        slot_mapping: torch.Tensor,
    ) -> None:
        """One layer of :meth:`batched_from_gpu`."""

    @abstractmethod
    def layer_to_gpu(
        self,
        layer: int,
        objs: Sequence[MemoryObj],
        ranges: Sequence[tuple[int, int]],
        slot_mapping: torch.Tensor,
    ) -> None:
        """One layer of :meth:`batched_to_gpu`."""

    def from_gpu(self, obj: MemoryObj, start: int, end: int, slot_mapping: torch.Tensor) -> None:
        self.batched_from_gpu([obj], [(start, end)], slot_mapping)

    def to_gpu(self, obj: MemoryObj, start: int, end: int, slot_mapping: torch.Tensor) -> None:
        self.batched_to_gpu([obj], [(start, end)], slot_mapping)
