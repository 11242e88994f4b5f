"""A hash table from anchor to place, for many millions of anchors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_MAX_LOAD = 0.6


class AnchorTable:
    """Maps the hash of an anchor to one place, an int64. Open addressing in two arrays: 16 bytes a slot.

    A hint, not a promise: what it finds must be compared with the tokens. So nothing is ever deleted; entries that have
    become wrong are left behind when the table is full and its :meth:`successor` takes over.
    """

    def __init__(self, capacity: int = 1 << 12) -> None:
        """``capacity``: slots, a power of two."""
        self._hashes = np.zeros(capacity, np.uint64)
        self._places = np.full(capacity, -1, np.int64)
        self._mask = capacity - 1
        self._used = 0

    def __len__(self) -> int:
        return self._used

    @property
    def capacity(self) -> int:
        return len(self._hashes)

    def full(self, more: int) -> bool:
        """Whether ``more`` anchors would make it slow."""
        return self._used + more > _MAX_LOAD * self.capacity

    def successor(self, wanted: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]], more: int) -> AnchorTable:
        """A table with room, also for ``more`` anchors, with those entries whose places are ``wanted``."""
        used = self._places >= 0
        hashes, places = self._hashes[used], self._places[used]
        keep = wanted(places)
        capacity = self.capacity
        kept = int(keep.sum())
        while kept > _MAX_LOAD / 2 * capacity or kept + more > _MAX_LOAD * capacity:
            capacity *= 2
        table = AnchorTable(capacity)
        table.put(hashes[keep], places[keep])
        return table

    def put(self, hashes: npt.NDArray[np.uint64], places: npt.NDArray[np.int64]) -> None:
        """Note where anchors are; for a hash that is there already the new place counts.

        Within one call the last place of a hash wins.
        """
        hashes, latest = np.unique(hashes[::-1], return_index=True)
        places = places[::-1][latest]
        slots = self._home(hashes)
        while len(hashes):
            free = self._places[slots] < 0
            same = (self._hashes[slots] == hashes) & ~free
            # Two anchors of one call may want the same free slot: the first of them gets it.
            _, first = np.unique(slots, return_index=True)
            wins = np.zeros(len(slots), bool)
            wins[first] = True
            take = same | (free & wins)
            self._used += int((take & free).sum())
            self._hashes[slots[take]] = hashes[take]
            self._places[slots[take]] = places[take]
            hashes, places, slots = hashes[~take], places[~take], slots[~take]
            # Who lost a free slot looks at it again: the winner's hash is another, so it moves on in the next round.
            slots = (slots + 1) & self._mask

    def get(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """The place of each anchor, −1 for those that are not there."""
        found = np.full(len(hashes), -1, np.int64)
        open_ = np.arange(len(hashes))
        slots = self._home(hashes)
        while len(open_):
            places = self._places[slots]
            hit = (self._hashes[slots] == hashes[open_]) & (places >= 0)
            found[open_[hit]] = places[hit]
            on = ~hit & (places >= 0)
            open_, slots = open_[on], (slots[on] + 1) & self._mask
        return found

    def _home(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        # The low bits of an anchor's hash are zero, or it would be none.
        slots: npt.NDArray[np.int64] = (hashes >> np.uint64(8)).astype(np.int64) & self._mask
        return slots
