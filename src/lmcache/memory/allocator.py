"""The pool that chunks of KV live in: slabs of host memory, cut into pieces of whole pages."""

from __future__ import annotations

import bisect
import logging
import os
import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch

from lmcache.memory.free_space import FreeSpace
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.memory.shared_memory import HUGE_PAGE, SharedMemorySource
from lmcache.memory.slab import Slab
from lmcache.memory.slab_growth import PINNED_SLAB_BYTES, SlabGrowth
from lmcache.memory.window import cheapest_window

logger = logging.getLogger(__name__)

GRANULE = 4096
"""Alignment and unit of size of every object: a page, and what O_DIRECT asks for."""

DEFAULT_SLAB_BYTES = 512 << 20
"""Smaller ones cut more objects off. Pinned ones are smaller all the same, and of a size that cuts none off."""

_AHEAD_BYTES = 1 << 30
_AHEAD_SHARE = 8


@dataclass(frozen=True)
class PoolStats:
    """``used_bytes`` counts live objects with their padding, ``reserved_bytes`` slabs, ``huge_bytes`` those of reserved
    huge pages; ``largest_free_bytes`` is the largest object that fits without eviction into what is reserved."""

    capacity_bytes: int
    reserved_bytes: int
    huge_bytes: int
    used_bytes: int
    largest_free_bytes: int
    objects: int


class SlabAllocator:
    """Hands out :class:`MemoryObj` from at most ``capacity_bytes`` of host memory.

    Memory is reserved a slab at a time when the slabs so far have no hole that is large enough, and becomes resident
    as it is written. Memory that is pinned is resident at once, and reserved ahead: as soon as there is any, a gigabyte
    or an eighth of the capacity is free or being made, until the capacity is spent. An object lies inside one slab, is
    4096-byte aligned, and padded to a multiple of 4096 bytes. Thread-safe.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        slab_bytes: int = DEFAULT_SLAB_BYTES,
        pin_memory: bool | None = None,
        shared: SharedMemorySource | None = None,
    ) -> None:
        """Args:
        capacity_bytes: never exceeded; rounded down to whole pages, with ``shared`` to whole huge pages.
        slab_bytes: unit of growth, of pinned memory at most; an object that is larger gets a slab of its own size.
        pin_memory: page-lock each slab with CUDA; None pins when CUDA is there.
        shared: makes memory that other processes can map; see :meth:`places_of`. Taken over.

        Raises:
            ValueError: a size is smaller than a page.
        """
        if capacity_bytes < GRANULE or slab_bytes < GRANULE:
            raise ValueError(
                f"capacity_bytes={capacity_bytes} and slab_bytes={slab_bytes} must each be at least {GRANULE}"
            )
        # Every slab, and all of them together, are so many granules or a multiple.
        self._unit = HUGE_PAGE // GRANULE if shared is not None and capacity_bytes >= HUGE_PAGE else 1
        self._capacity = capacity_bytes // GRANULE // self._unit * self._unit
        self._slab_size = self._whole_units(slab_bytes // GRANULE)
        self._pin = pin_memory
        self._shared = shared
        self._lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._space = FreeSpace()
        self._slabs: list[Slab] = []
        self._reserved = 0
        self._used = 0
        self._largest = 1
        self._growth: SlabGrowth | None = None
        self._live: dict[int, MemoryObj] = {}
        self._closed = False
        if shared is not None:
            shared.prepare(self._next_slab_size() * GRANULE)

    @property
    def capacity_bytes(self) -> int:
        return self._capacity * GRANULE

    @property
    def used_bytes(self) -> int:
        """Bytes of live objects, padding included."""
        return self._used * GRANULE

    def allocate(self, spec: KVSpec) -> MemoryObj | None:
        """A fresh object with one reference, its bytes undefined; None when no hole is large enough (or after
        :meth:`close`)."""
        size = _granules(spec.nbytes)
        with self._lock:
            if size > self._capacity or self._closed:
                return None
            while (start := self._space.take(size)) is None:
                if not self._grow(size) or self._closed:
                    return None
            slab = self._slab_of(start)
            begin = (start - slab.base) * GRANULE
            obj = MemoryObj(spec, slab.buffer[begin : begin + size * GRANULE], start, self._free, self._count_lock)
            self._live[start] = obj
            self._used += size
            if self._growth is not None and self._lacks_room_ahead():
                self._growth.wake()
            return obj

    def owns(self, obj: MemoryObj) -> bool:
        """Whether ``obj`` is a live object of this pool."""
        return self._live.get(obj.offset) is obj

    def places_of(self, objs: Sequence[MemoryObj]) -> list[tuple[int, int]]:
        """The number of the slab that each live object lies in, and at which byte of it."""
        with self._lock:
            slabs = [self._slab_of(obj.offset) for obj in objs]
        return [(slab.number, (obj.offset - slab.base) * GRANULE) for slab, obj in zip(slabs, objs, strict=True)]

    def descriptor_of(self, number: int) -> tuple[int, int] | None:
        """A descriptor of the shared slab ``number``, which is the caller's to close, and the slab's bytes; None when
        there is no such slab any more."""
        with self._lock:
            for slab in self._slabs:
                if slab.number == number and slab.descriptor is not None:
                    return os.dup(slab.descriptor), slab.nbytes
        return None

    def live_objects(self) -> list[MemoryObj]:
        """Every object that was not given back yet, in address order."""
        with self._lock:
            return [obj for _, obj in sorted(self._live.items())]

    def make_way(self, nbytes: int, removable: Container[int]) -> list[int] | None:
        """Which objects have to be given back so that :meth:`allocate` has room for ``nbytes``.

        Args:
            removable: offsets of the objects that may go.

        Returns:
            Offsets of the neighbours that hold the fewest bytes; empty when there is room already; None when no
            choice of removable objects makes room, or after :meth:`close`. O(live objects).
        """
        size = _granules(nbytes)
        with self._lock:
            if self._closed:
                return None
            pieces = [(start, _granules(obj.spec.nbytes)) for start, obj in sorted(self._live.items())]
            if all(slab.nbytes // GRANULE < size for slab in self._slabs):
                return self._empty_slabs(size, pieces, removable)
            windows = [
                window
                for slab in self._slabs
                if (window := cheapest_window(_inside(slab, pieces), slab.base, _end(slab), size, removable))
            ]
        return min(windows, key=lambda window: window.cost).starts if windows else None

    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(
                capacity_bytes=self.capacity_bytes,
                reserved_bytes=self._reserved * GRANULE,
                huge_bytes=self._huge_bytes(),
                used_bytes=self.used_bytes,
                largest_free_bytes=self._space.largest * GRANULE,
                objects=len(self._live),
            )

    def close(self) -> None:
        """Allocate no more; unpin and unmap as soon as nothing refers to the memory. Idempotent.

        Objects that are still referenced are named in the log and stay valid: the last one to go unmaps.
        """
        with self._lock:
            was_closed, self._closed = self._closed, True
        if self._growth is not None:
            self._growth.close()
        if was_closed:
            return
        with self._lock:
            if self._shared is not None:
                self._shared.close()
            if self._live:
                first = ", ".join(map(repr, list(self._live.values())[:4]))
                logger.warning("pool closed with %d objects still referenced, among them %s", len(self._live), first)
            else:
                self._unmap()

    def _free(self, obj: MemoryObj) -> None:
        with self._lock:
            size = _granules(obj.spec.nbytes)
            del self._live[obj.offset]
            self._used -= size
            self._space.give(obj.offset, size)
            if self._closed and not self._live:
                self._unmap()

    def _slab_of(self, start: int) -> Slab:
        if len(self._slabs) == 1:
            return self._slabs[0]
        return self._slabs[bisect.bisect_right(self._slabs, start, key=lambda slab: slab.base) - 1]

    def _grow(self, size: int) -> bool:
        """Reserve a slab, if that may make a hole of ``size`` granules; False when the capacity does not allow it."""
        self._largest = max(self._largest, size)
        is_coming = self._growth is not None and self._growth.coming_bytes > 0
        if not is_coming and self._capacity - self._reserved < size:
            self._drop_empty_slabs(size)
            if self._capacity - self._reserved < size:
                return False
        pin = torch.cuda.is_available() if self._pin is None else self._pin
        if pin and self._shared is None:
            if self._growth is None:
                self._growth = SlabGrowth(self._lock, self._next_pinned_bytes, self._attach)
            self._growth.wait(size * GRANULE)
            return True
        nbytes = max(self._next_slab_size(), self._whole_units(size)) * GRANULE
        if self._shared is None:
            self._attach(Slab(0, nbytes, pin=False))
            return True
        memory = self._shared.take(nbytes)
        self._attach(Slab(0, nbytes, pin=pin, descriptor=memory.descriptor, huge=memory.huge))
        if not (memory.huge or memory.late):
            self._shared.tell_what_to_set(self.capacity_bytes, self._huge_bytes())
        if following := self._next_slab_size():
            self._shared.prepare(following * GRANULE)
        return True

    def _attach(self, slab: Slab) -> None:
        if self._closed:
            slab.close()
            return
        # One granule of the address space stays unused between slabs: their free ranges must not merge.
        slab.base = _end(self._slabs[-1]) + 1 if self._slabs else 0
        self._slabs.append(slab)
        self._reserved += slab.nbytes // GRANULE
        self._space.give(slab.base, slab.nbytes // GRANULE)

    def _next_pinned_bytes(self, waited_for: int) -> int:
        """See :class:`SlabGrowth`."""
        room = self._capacity - self._reserved
        size = waited_for // GRANULE
        if not room or (size > room if size else not self._lacks_room_ahead()):
            return 0
        # Nothing is cut off from slabs that are filled with objects of the same size, as most are.
        size = max(size, self._largest)
        slab_size = max(1, min(self._slab_size, PINNED_SLAB_BYTES // GRANULE) // size) * size
        return (slab_size if room >= 2 * slab_size else room) * GRANULE

    def _lacks_room_ahead(self) -> bool:
        ahead = min(_AHEAD_BYTES // GRANULE, self._capacity // _AHEAD_SHARE)
        return self._reserved - self._used < ahead and self._reserved < self._capacity

    def _huge_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs if slab.huge)

    def _next_slab_size(self) -> int:
        """In granules; 0 when the capacity is spent."""
        room = self._capacity - self._reserved
        # A rest smaller than a slab joins the last slab, so that no stub too small for an object is left over.
        return self._slab_size if room >= 2 * self._slab_size else room

    def _whole_units(self, size: int) -> int:
        return -(-size // self._unit) * self._unit

    def _empty_slabs(self, size: int, pieces: Sequence[tuple[int, int]], removable: Container[int]) -> list[int] | None:
        """Objects whose going empties enough slabs to be replaced by one of ``size`` granules; None if none do."""
        room = self._capacity - self._reserved
        contents = [(slab, _inside(slab, pieces)) for slab in self._slabs]
        starts: list[int] = []
        for slab, inside in sorted(contents, key=lambda content: sum(length for _, length in content[1])):
            if room >= size:
                break
            if all(start in removable for start, _ in inside):
                starts += [start for start, _ in inside]
                room += slab.nbytes // GRANULE
        return starts if room >= size else None

    def _drop_empty_slabs(self, size: int) -> None:
        """Give up empty slabs, the youngest first, if that makes room for one that holds ``size`` granules.

        Needed only when an object is larger than the slabs that the capacity was spent on.
        """
        empty = [slab for slab in reversed(self._slabs) if self._space.is_free(slab.base, slab.nbytes // GRANULE)]
        room = self._capacity - self._reserved
        if room + sum(slab.nbytes // GRANULE for slab in empty) < size:
            return
        for slab in empty:
            if self._capacity - self._reserved >= size:
                return
            self._space.withdraw(slab.base)
            self._reserved -= slab.nbytes // GRANULE
            self._slabs.remove(slab)
            slab.discard()

    def _unmap(self) -> None:
        for slab in self._slabs:
            slab.close()
        self._slabs.clear()
        self._space = FreeSpace()
        self._reserved = 0


def _end(slab: Slab) -> int:
    return slab.base + slab.nbytes // GRANULE


def _inside(slab: Slab, pieces: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    return pieces[bisect.bisect_left(pieces, (slab.base, 0)) : bisect.bisect_left(pieces, (_end(slab), 0))]


def _granules(nbytes: int) -> int:
    return max(1, -(-nbytes // GRANULE))
