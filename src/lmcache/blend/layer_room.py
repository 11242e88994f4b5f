"""Memory for the layers of a batch while it is blended."""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

import torch

from lmcache.memory.slab import Slab

_SLAB_BYTES = 32 * 2**20
_ALIGNMENT = 64

_Kind: TypeAlias = tuple[torch.Size, torch.dtype]


class LayerRoom:
    """Gives out tensors ``[N, heads, dim]`` whose heads lie one after the other: what attention reads of a head is one
    piece of memory, as in the pages of most engines.

    A room may serve one blend after the other, and on the CPU keeps its memory in between: a blend touches hundreds of
    megabytes, and getting them from the system can take a third of its time. On other devices torch does that.
    """

    def __init__(self, kept_bytes: int = 512 * 2**20) -> None:
        """``kept_bytes``: what it keeps at most from one blend to the next."""
        self._kept_bytes = kept_bytes
        self._slabs: list[torch.Tensor] = []
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._free: defaultdict[_Kind, list[torch.Tensor]] = defaultdict(list)

    def clear(self) -> None:
        """Nothing that was taken is used any more."""
        self._free.clear()
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        while sum(len(slab) for slab in self._slabs) > self._kept_bytes:
            self._slabs.pop()

    def take(self, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """Not zeroed. ``like``: ``[n, heads, dim]``, for all but the number of rows."""
        _, heads, dim = like.shape
        shape = torch.Size((heads, num_rows, dim))
        if like.device.type != "cpu":
            return like.new_empty(shape).transpose(0, 1)
        free = self._free[shape, like.dtype]
        return (free.pop() if free else self._cut(shape, like.dtype)).transpose(0, 1)

    def give_back(self, tensor: torch.Tensor) -> None:
        """``tensor`` came from :meth:`take` and is not used any more."""
        if tensor.device.type == "cpu":
            heads_first = tensor.transpose(0, 1)
            self._free[heads_first.shape, tensor.dtype].append(heads_first)

    def _cut(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        nbytes = shape.numel() * dtype.itemsize
        while len(self._rest) < nbytes:
            if self._used == len(self._slabs):
                self._slabs.append(Slab(0, max(nbytes, _SLAB_BYTES), pin=False).buffer)
            self._rest = self._slabs[self._used]
            self._used += 1
        taken = self._rest[:nbytes].view(dtype).view(shape)
        self._rest = self._rest[-(-nbytes // _ALIGNMENT) * _ALIGNMENT :]
        return taken
