"""Every chunk on the disk, in memory: key → file number, spec and packing, a few machine words each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.disk.packed import Packed


class Entry(NamedTuple):
    """A chunk on the disk. ``charge`` is the bytes set aside for it; ``packed`` is None where its payload is the
    chunk's bytes."""

    file_id: int
    spec: KVSpec
    packed: Packed | None
    charge: int


class EntryTable:
    """A mapping for millions of entries.

    A chunk's number and the number of its spec share one int, because a tuple for each entry would take three times
    as much and be walked by every full garbage collection of the engine's process. Guarded by its owner's lock.

    Attributes:
        charged: the charges of all entries.
    """

    # 16 million specs and packings (specs differ in the number of tokens, packings in the number of blocks, so there
    # are thousands), 2**39 files.
    _SPEC_BITS = 24

    def __init__(self, charge: Callable[[int], int]) -> None:
        """Args:
        charge: bytes to set aside for a payload of so many bytes.
        """
        self.charged = 0
        self._charge = charge
        self._packed: dict[CacheKey, int] = {}
        self._specs: list[tuple[KVSpec, Packed | None, int]] = []
        self._spec_ids: dict[tuple[KVSpec, Packed | None], int] = {}

    def __contains__(self, key: CacheKey) -> bool:
        return key in self._packed

    def __len__(self) -> int:
        return len(self._packed)

    def add(self, key: CacheKey, file_id: int, spec: KVSpec, packed: Packed | None = None) -> int:
        """``key`` must be new. What it is charged."""
        spec_id = self._spec_id(spec, packed)
        self._packed[key] = file_id << self._SPEC_BITS | spec_id
        charge = self._specs[spec_id][2]
        self.charged += charge
        return charge

    def get(self, key: CacheKey) -> Entry | None:
        packed = self._packed.get(key)
        return None if packed is None else self._unpack(packed)

    def pop(self, key: CacheKey) -> Entry | None:
        packed = self._packed.pop(key, None)
        if packed is None:
            return None
        entry = self._unpack(packed)
        self.charged -= entry.charge
        return entry

    def file_ids(self) -> npt.NDArray[np.int64]:
        """Every file number, ascending."""
        ids = np.fromiter(self._packed.values(), dtype=np.int64, count=len(self._packed)) >> self._SPEC_BITS
        ids.sort()
        return ids

    def _spec_id(self, spec: KVSpec, packed: Packed | None) -> int:
        # Most chunks are of one spec, and hashing one takes longer than all the rest of adding an entry.
        if self._specs and self._specs[-1][0] is spec and self._specs[-1][1] == packed:
            return len(self._specs) - 1
        spec_id = self._spec_ids.get((spec, packed))
        if spec_id is None:
            spec_id = self._spec_ids[spec, packed] = len(self._specs)
            self._specs.append((spec, packed, self._charge(spec.nbytes if packed is None else packed.nbytes)))
        return spec_id

    def _unpack(self, packed: int) -> Entry:
        return Entry(packed >> self._SPEC_BITS, *self._specs[packed & (1 << self._SPEC_BITS) - 1])
