"""Copying single tokens between two planes, whatever their strides."""

from __future__ import annotations

from functools import cached_property

import torch


class TokenIndex:
    """Tokens of a plane ``[blocks, block_size, heads, dim]``: int64 ``slots`` ``[T]`` on the CPU, none negative."""

    def __init__(self, slots: torch.Tensor, block_size: int, device: torch.device) -> None:
        self._slots = slots
        self._block_size = block_size
        self._device = device

    @cached_property
    def run(self) -> slice | None:
        """The tokens as a slice of slots, if they are consecutive."""
        first, count = int(self._slots[0]), len(self._slots)
        consecutive = bool(torch.equal(self._slots, torch.arange(first, first + count)))
        return slice(first, first + count) if consecutive else None

    @cached_property
    def slots(self) -> torch.Tensor:
        return self._slots.to(self._device)

    @cached_property
    def blocks_and_offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.slots // self._block_size, self.slots % self._block_size


def slot_view(plane: torch.Tensor) -> torch.Tensor:
    """``plane`` as ``[slots, heads, dim]`` if equal steps lead from each token to the next, else as it is."""
    blocks, size, heads, dim = plane.shape
    if blocks > 1 and plane.stride(0) != size * plane.stride(1):
        return plane
    return plane.as_strided((blocks * size, heads, dim), plane.stride()[1:])


def read_tokens(plane: torch.Tensor, index: TokenIndex) -> torch.Tensor:
    """``[T, heads, dim]``; a view where that is possible. ``plane`` is what :func:`slot_view` gives."""
    if plane.dim() == 4:
        return plane[index.blocks_and_offsets]
    return plane[index.run] if index.run is not None else plane.index_select(0, index.slots)


def write_tokens(plane: torch.Tensor, index: TokenIndex, values: torch.Tensor) -> None:
    """The reverse of :func:`read_tokens`; ``values`` may lie on another device."""
    if plane.dim() == 4:
        plane[index.blocks_and_offsets] = values.to(plane.device)
    elif index.run is not None:
        plane[index.run].copy_(values)
    else:
        plane[index.slots] = values.to(plane.device)
