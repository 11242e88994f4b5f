"""The yardstick for host memory: a plain copy of as many chunks, of as many bytes each, on as many threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcache.memory.slab import Slab


def pool_like_chunks(count: int, nbytes: int) -> torch.Tensor:
    """``[count, nbytes]`` of the kind of memory that the engine's pool is made of, untouched."""
    return Slab(0, count * nbytes, pin=False).buffer.view(count, nbytes)


def touched(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, all of it resident."""
    return tensor.fill_(1)


def copy_chunks(target: Sequence[torch.Tensor] | torch.Tensor, source: Sequence[torch.Tensor] | torch.Tensor) -> None:
    """One ``copy_`` a chunk."""
    for to, this in zip(target, source, strict=True):
        to.copy_(this)
