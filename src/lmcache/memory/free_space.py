"""Best-fit bookkeeping of free ranges: which granules of an address space are free."""

from __future__ import annotations

from sortedcontainers import SortedList

_OFFSET_BITS = 40
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1


class FreeSpace:
    """Free ranges of an address space counted in granules; taking and giving back are O(log n).

    Neighbouring free ranges are always merged. Ranges that must never merge (two slabs) need a gap between them.
    """

    def __init__(self) -> None:
        # `size << 40 | start`: one int sorts by size and then by address, and compares faster than a tuple.
        self._by_size: SortedList[int] = SortedList()
        self._size_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}

    @property
    def largest(self) -> int:
        return self._by_size[-1] >> _OFFSET_BITS if self._by_size else 0

    def take(self, size: int) -> int | None:
        """Start of ``size`` granules cut from the smallest range that has them, the lowest of equals; None if none."""
        position = self._by_size.bisect_left(size << _OFFSET_BITS)
        if position == len(self._by_size):
            return None
        hole = self._by_size[position]
        start = hole & _OFFSET_MASK
        hole_size = hole >> _OFFSET_BITS
        self._remove(start, hole_size)
        if hole_size > size:
            self._insert(start + size, hole_size - size)
        return int(start)

    def give(self, start: int, size: int) -> None:
        """Give ``[start, start + size)`` back, merged with the free ranges on both sides."""
        before = self._start_before.get(start)
        if before is not None:
            size += start - before
            self._remove(before, start - before)
            start = before
        after = self._size_at.get(start + size)
        if after is not None:
            self._remove(start + size, after)
            size += after
        self._insert(start, size)

    def is_free(self, start: int, size: int) -> bool:
        """Whether ``[start, start + size)`` is one free range, with nothing free around it."""
        return self._size_at.get(start) == size

    def withdraw(self, start: int) -> None:
        """Take the whole free range at ``start`` out of the address space."""
        size = self._size_at[start]
        self._remove(start, size)

    def _insert(self, start: int, size: int) -> None:
        self._by_size.add(size << _OFFSET_BITS | start)
        self._size_at[start] = size
        self._start_before[start + size] = start

    def _remove(self, start: int, size: int) -> None:
        self._by_size.remove(size << _OFFSET_BITS | start)
        del self._size_at[start]
        del self._start_before[start + size]
