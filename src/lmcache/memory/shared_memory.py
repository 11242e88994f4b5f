"""Memory that other processes can map too: of huge pages where the system keeps some free, else of ordinary ones."""

from __future__ import annotations

import logging
import mmap
import os
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

logger = logging.getLogger(__name__)

HUGE_PAGE = 2 << 20
"""Bytes; memory of another multiple is never of huge pages."""

_COUNTS = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


_PATIENCE = 0.5
"""Seconds; clients wait for an answer meanwhile."""


@dataclass(frozen=True)
class SharedMemory:
    """``descriptor`` is the owner's to close. ``late``: it would be huge if there had been time."""

    descriptor: int
    nbytes: int
    huge: bool
    late: bool = False


class SharedMemorySource:
    """Makes the memory of one pool, a piece at a time; each is of huge pages if there are enough just then.

    The kernel clears huge pages when they are given out, not when they are first written: half a gigabyte takes 0.06 s,
    and a second in a virtual machine that has not used this memory before. So the next piece is made ahead. Not
    thread-safe.
    """

    def __init__(self, *, huge_pages: bool = True) -> None:
        """``huge_pages``: False leaves them to the other programs that they may have been set aside for."""
        self._huge_pages = huge_pages
        self._ahead: Future[SharedMemory] | None = None
        self._ahead_nbytes = 0
        self._said = False

    def prepare(self, nbytes: int) -> None:
        """The next :meth:`take` will probably want so many."""
        if not self._huge_pages or self._ahead is not None:
            return
        self._ahead, self._ahead_nbytes = Future(), nbytes
        Thread(target=_fulfil, args=(self._ahead, nbytes), name="lmcache-huge-pages", daemon=True).start()

    def take(self, nbytes: int) -> SharedMemory:
        """Waits a moment for what was prepared; if it is of another size it goes back to the system.

        Raises:
            OSError: there is no memory to share.
        """
        if self._ahead_nbytes != nbytes:
            self.close()
        if (ahead := self._ahead) is None:
            return make_shared(nbytes, huge_pages=self._huge_pages)
        if not wait([ahead], _PATIENCE).done:
            return replace(make_shared(nbytes, huge_pages=False), late=True)
        self._ahead = None
        return ahead.result()

    def tell_what_to_set(self, pool_bytes: int, huge_bytes: int) -> None:
        """Say once in the log what this system lacks for all of the pool to be of huge pages, of which it has
        ``huge_bytes``."""
        if self._said or not self._huge_pages:
            return
        self._said = True
        try:
            total, free, promised = (
                int((_COUNTS / f"{what}_hugepages").read_text()) for what in ("nr", "free", "resv")
            )
        except (OSError, ValueError):
            return  # such a system has none to set aside
        used_by_others = total - (free - promised) - huge_bytes // HUGE_PAGE
        logger.info(
            "%d of %d MiB are in huge pages; copies from the rest are slower. For all of it: "
            "`sysctl vm.nr_hugepages=%d` before the server starts (now %d, %d of them free)",
            huge_bytes >> 20,
            pool_bytes >> 20,
            max(0, used_by_others) + -(-pool_bytes // HUGE_PAGE),
            total,
            free - promised,
        )

    def close(self) -> None:
        """What was prepared goes back to the system. Idempotent."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.add_done_callback(_give_back)


def make_shared(nbytes: int, *, huge_pages: bool) -> SharedMemory:
    """Fresh memory, of huge pages if it may be, there are enough, and ``nbytes`` is a multiple of :data:`HUGE_PAGE`.

    Raises:
        OSError: there is no memory to share.
    """
    if huge_pages and nbytes % HUGE_PAGE == 0 and (descriptor := _of_huge_pages(nbytes)) is not None:
        return SharedMemory(descriptor, nbytes, huge=True)
    descriptor = os.memfd_create("lmcache-slab", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, nbytes)
    return SharedMemory(descriptor, nbytes, huge=False)


def _of_huge_pages(nbytes: int) -> int | None:
    try:
        descriptor = os.memfd_create("lmcache-slab", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    except OSError:
        return None
    try:
        os.ftruncate(descriptor, nbytes)
        # Mapping takes all pages or none. That they are there is only certain once they are given out: a container's
        # limit or its share of the NUMA nodes counts then, and whoever touches a page that is lacking is killed.
        with mmap.mmap(descriptor, nbytes):
            os.posix_fallocate(descriptor, 0, nbytes)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _fulfil(ahead: Future[SharedMemory], nbytes: int) -> None:
    try:
        ahead.set_result(make_shared(nbytes, huge_pages=True))
    except BaseException as error:
        ahead.set_exception(error)


def _give_back(ahead: Future[SharedMemory]) -> None:
    if ahead.exception() is None:
        os.close(ahead.result().descriptor)
