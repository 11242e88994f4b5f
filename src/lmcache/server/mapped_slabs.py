"""The server's memory, as a client sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from lmcache.memory.allocator import GRANULE
from lmcache.memory.slab import Slab
from lmcache.observability.logging import init_logger

logger = init_logger(__name__)


class MappedSlabs:
    """Slabs of one server, mapped when a chunk in them is first used, and pinned for CUDA behind the caller's back."""

    def __init__(self, fetch: Callable[[int], tuple[int, int]]) -> None:
        """``fetch``: a descriptor and the bytes of a slab; raises OSError or ValueError if it cannot be had."""
        self._fetch = fetch
        self._lock = threading.Lock()
        self._slabs: dict[int, Slab] = {}
        self._pinning = threading.Lock()
        self._closed = False

    def view(self, number: int, offset: int, nbytes: int) -> torch.Tensor:
        """Uint8, ``nbytes`` rounded up to whole pages.

        Raises:
            OSError: the slab cannot be mapped.
            ValueError: there is no such place.
        """
        slab = self._slabs.get(number) or self._map(number)
        end = offset + max(1, -(-nbytes // GRANULE)) * GRANULE
        if offset % GRANULE or end > slab.nbytes:
            raise ValueError(f"bytes {offset} … {end} of a slab of {slab.nbytes}")
        return slab.buffer[offset:end]

    def close(self) -> None:
        """When nothing refers to the memory any more. Idempotent."""
        with self._pinning, self._lock:
            self._closed = True
            slabs, self._slabs = self._slabs, {}
            for slab in slabs.values():
                slab.close()

    def _map(self, number: int) -> Slab:
        descriptor, nbytes = self._fetch(number)
        with self._lock:
            slab = Slab(0, nbytes, pin=False, descriptor=descriptor)
            if self._closed:
                slab.close()
                raise ValueError("the server's memory is given up")
            if number in self._slabs:  # another thread was quicker
                slab.close()
            else:
                self._slabs[number] = slab
                if torch.cuda.is_available():
                    threading.Thread(target=self._pin, args=(slab,), name="lmcache-pin", daemon=True).start()
            return self._slabs[number]

    def _pin(self, slab: Slab) -> None:
        # Takes seconds; until it is done copies are slower, and as right as ever.
        with self._pinning:
            if not self._closed:
                slab.fault_in()
                slab.pin()
