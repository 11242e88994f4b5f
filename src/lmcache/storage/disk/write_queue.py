"""Chunks that were admitted and are not entries yet: those that wait, and those being written."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj
from lmcache.storage.disk.index import ROWS_PER_COMMIT, IndexRow
from lmcache.storage.disk.packed import Packed

# Enough to be worth two commits, little enough that the next burst can be prepared meanwhile.
_BURST_BYTES = 64 << 20


@dataclass(eq=False)
class Write:
    """A chunk to be written. Holds a reference to ``obj``.

    Attributes:
        charge: bytes set aside for it: an upper bound, for how small it is packed only the writing finds out.
        packed: how it was written.
    """

    row: IndexRow
    obj: MemoryObj
    charge: int
    packed: Packed | None = None
    cancelled: bool = False

    @property
    def key(self) -> CacheKey:
        return self.row.key


class WriteQueue:
    """First in, first out, bounded by the host memory it holds. Guarded by its owner's lock, except ``in``.

    Gives no reference back: whoever takes a write out of it does.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._waiting: dict[CacheKey, Write] = {}
        self._writing: dict[CacheKey, Write] = {}

    def __contains__(self, key: CacheKey) -> bool:
        # In this order, that of the way through: a key that moves on meanwhile is still found.
        return key in self._waiting or key in self._writing

    def __len__(self) -> int:
        return len(self._waiting) + len(self._writing)

    @property
    def waiting(self) -> list[Write]:
        """Oldest first."""
        return list(self._waiting.values())

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def get(self, key: CacheKey) -> Write | None:
        return self._waiting.get(key) or self._writing.get(key)

    def has_room(self, obj: MemoryObj) -> bool:
        return self._bytes + len(obj.padded_bytes) <= self._max_bytes

    def push(self, write: Write) -> None:
        self._waiting[write.key] = write
        self._bytes += len(write.obj.padded_bytes)

    def cancel(self, key: CacheKey) -> Write | None:
        """Take ``key`` out. One that is being written is only marked, and None returned: :meth:`end` comes later."""
        write = self._waiting.pop(key, None)
        if write is None:
            self._writing.pop(key).cancelled = True
        else:
            self._bytes -= len(write.obj.padded_bytes)
        return write

    def take_burst(self) -> list[Write]:
        """The next ones to be written, as many as are worth one commit."""
        burst: list[Write] = []
        room = _BURST_BYTES
        for write in self.waiting:
            if room <= 0 or len(burst) == ROWS_PER_COMMIT:
                break
            self._writing[write.key] = write
            del self._waiting[write.key]
            burst.append(write)
            room -= write.charge
        return burst

    def end(self, write: Write) -> None:
        """``write`` is over, one way or the other."""
        self._bytes -= len(write.obj.padded_bytes)
        if not write.cancelled:
            del self._writing[write.key]
