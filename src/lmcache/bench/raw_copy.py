"""The yardstick for host memory: a plain copy of as many chunks, of as many bytes each, on as many threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Both sides copy on one thread, as vLLM's CPU workers and our own run on a small machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
