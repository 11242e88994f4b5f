"""One piece of host memory: the unit in which a pool grows and, with CUDA, pins."""

from __future__ import annotations

import contextlib
import logging
import mmap
from typing import Any

import torch

logger = logging.getLogger(__name__)

_CUDA_HOST_REGISTER_PORTABLE = 1  # pinned for every CUDA context, not only for the current one


class Slab:
    """``nbytes`` of anonymous memory that the kernel hands out page by page as they are first written.

    Reserving is free: neither time nor resident memory depends on ``nbytes``. Pinning makes every page resident.
    """

    def __init__(self, base: int, nbytes: int, *, pin: bool) -> None:
        """Args:
        base: where the slab starts in its pool's address space, in granules.
        pin: page-lock it with CUDA; memory that cannot be pinned is used as it is.
        """
        self.base = base
        self.nbytes = nbytes
        # Python's default is a shared mapping, for which the kernel gives no huge pages.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                pages.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                logger.debug("transparent huge pages are not available")
        self.buffer = torch.frombuffer(pages, dtype=torch.uint8)
        self.pinned = pin and self._register()

    def close(self) -> None:
        """Unpin and give up the memory; the slab is not to be used again."""
        if self.pinned:
            error = int(_cudart().cudaHostUnregister(self.buffer.data_ptr()))
            if error:
                logger.warning("cannot unpin %d MiB of host memory (CUDA error %d)", self.nbytes >> 20, error)
                _forget_cuda_error()
            self.pinned = False
        # The tensor keeps the mapping alive, but the mapping does not know of its views: unmapping explicitly would
        # leave a view that somebody still holds pointing at nothing. The last one to go unmaps.
        del self.buffer

    def _register(self) -> bool:
        error = int(_cudart().cudaHostRegister(self.buffer.data_ptr(), self.nbytes, _CUDA_HOST_REGISTER_PORTABLE))
        if error:
            logger.warning(
                "cannot pin %d MiB of host memory (CUDA error %d); copies to and from the GPU will be slower. "
                "Is the locked-memory limit (ulimit -l) or the container's memory too small?",
                self.nbytes >> 20,
                error,
            )
            _forget_cuda_error()
        return not error


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_cuda_error() -> None:
    """CUDA reports a failed call once more at the next kernel launch, which would be the engine's. Launch one here."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
