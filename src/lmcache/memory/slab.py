"""One piece of host memory: the unit in which a pool grows and, with CUDA, pins."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import logging
import mmap
import os
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

_CUDA_HOST_REGISTER_PORTABLE = 1  # pinned for every CUDA context, not only for the current one
_MADV_POPULATE_WRITE = 23  # Linux 5.14
# The kernel holds the process's map of memory for each of these, about a millisecond.
_FAULTED_IN_AT_ONCE = 4 << 20


_numbers = itertools.count()


class Slab:
    """``nbytes`` of memory that the kernel hands out page by page as they are first written.

    Reserving is free: neither time nor resident memory depends on ``nbytes``. Pinning makes every page resident.
    """

    def __init__(self, base: int, nbytes: int, *, pin: bool, descriptor: int | None = None, huge: bool = False) -> None:
        """Args:
        base: where the slab starts in its pool's address space, in granules.
        pin: page-lock it with CUDA; memory that cannot be pinned is used as it is.
        descriptor: of shared memory, which is mapped instead of fresh memory of our own; taken over.
        huge: that memory is known to be of huge pages.

        Raises:
            OSError: there is no address space for it.
        """
        self.base = base
        self.nbytes = nbytes
        self.number = next(_numbers)
        """No two slabs of this process have the same."""
        self.descriptor = descriptor
        self.huge = huge
        if descriptor is None:
            # Python's default is a shared mapping, for which the kernel gives no huge pages.
            self._pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._pages = mmap.mmap(descriptor, nbytes)
        _ask_for_huge_pages(self._pages)
        self.buffer = torch.frombuffer(self._pages, dtype=torch.uint8)
        self.pinned = False
        if pin:
            self.pin()

    def pin(self) -> None:
        """Page-lock it with CUDA, if that can be done."""
        self.pinned = self.pinned or self._register()

    def fault_in(self) -> None:
        """Have every page there before anything is written. Shared memory keeps what others wrote.

        Pinning would do so too, but with the driver's locks held.
        """
        address = self.buffer.data_ptr()
        for start in range(0, self.nbytes, _FAULTED_IN_AT_ONCE):
            size = min(_FAULTED_IN_AT_ONCE, self.nbytes - start)
            # Not by way of `mmap.madvise`: it keeps the interpreter.
            if not _libc().madvise(address + start, size, _MADV_POPULATE_WRITE):
                continue
            if ctypes.get_errno() != errno.EINVAL or self.descriptor is not None:
                return  # who pins it then finds out what is wrong
            ctypes.memset(address + start, 0, size)

    def discard(self) -> None:
        """:meth:`close`, and the memory goes back to the system although other processes may still have mapped it:
        what they read from it is zeros from now on."""
        if self.descriptor is not None and hasattr(mmap, "MADV_REMOVE"):
            with contextlib.suppress(OSError):
                self._pages.madvise(mmap.MADV_REMOVE)
        self.close()

    def close(self) -> None:
        """Unpin and give up the memory; the slab is not to be used again."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        if self.pinned:
            error = int(_cudart().cudaHostUnregister(self.buffer.data_ptr()))
            if error:
                logger.warning("cannot unpin %d MiB of host memory (CUDA error %d)", self.nbytes >> 20, error)
                forget_cuda_error()
            self.pinned = False
        # The tensor keeps the mapping alive, but the mapping does not know of its views: unmapping explicitly would
        # leave a view that somebody still holds pointing at nothing. The last one to go unmaps.
        del self.buffer, self._pages

    def _register(self) -> bool:
        error = int(_cudart().cudaHostRegister(self.buffer.data_ptr(), self.nbytes, _CUDA_HOST_REGISTER_PORTABLE))
        if error:
            logger.warning(
                "cannot pin %d MiB of host memory (CUDA error %d); copies to and from the GPU will be slower. "
                "Is the locked-memory limit (ulimit -l) or the container's memory too small?",
                self.nbytes >> 20,
                error,
            )
            forget_cuda_error()
        return not error


def _ask_for_huge_pages(pages: mmap.mmap) -> None:
    # Shared memory of ordinary pages gets them only where the system's `shmem_enabled` is `advise` or more.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            logger.debug("transparent huge pages are not available")


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def forget_cuda_error() -> None:
    """CUDA reports a failed call once more at the next kernel launch, which would be the engine's. Launch one here."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
