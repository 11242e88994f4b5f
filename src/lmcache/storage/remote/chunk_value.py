"""A chunk as a value of a remote store: the header of :mod:`lmcache.storage.chunk_header`, then the payload."""

from __future__ import annotations

from xxhash import xxh3_128_digest

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj
from lmcache.storage.chunk_header import HEADER_BYTES, ChunkFormatError, ChunkHeader
from lmcache.storage.interface import Allocate
from lmcache.storage.remote.interface import Receiver


def encode_chunk(key: CacheKey, obj: MemoryObj) -> tuple[memoryview, ...]:
    """The parts of the value. They lie in ``obj``, which must be held until they were sent.

    Raises:
        ValueError: the spec is longer than the header has room for.
    """
    payload = _view(obj)
    return memoryview(ChunkHeader(key, obj.spec, xxh3_128_digest(payload)).encode()), payload


class ChunkReceiver(Receiver):
    """Reads the value of ``key`` into an object of its own. What it got is checked; see :meth:`take`."""

    head_bytes = HEADER_BYTES

    def __init__(self, key: CacheKey, allocate: Allocate) -> None:
        self._key = key
        self._allocate = allocate
        self._header: ChunkHeader | None = None
        self._obj: MemoryObj | None = None
        self._whole = False
        self.failure: str | None = None
        """Why a value that is there was not taken: a short word to count by."""
        self.is_damaged = False
        """Whether the value is at fault, so that it is better removed."""

    def begin(self, nbytes: int, head: memoryview) -> memoryview | None:
        self.abandon()  # a store that tried twice
        try:
            header = ChunkHeader.decode(bytes(head))
        except ChunkFormatError as error:
            self._damaged(error)
            return None
        if nbytes != HEADER_BYTES + header.spec.nbytes:
            self._damaged(ChunkFormatError("size", f"{nbytes} bytes, of which {header.spec.nbytes} are payload"))
            return None
        obj = self._allocate(header.spec)
        if obj is None:
            self.failure = "no_memory"
            return None
        self._header, self._obj = header, obj
        return _view(obj)

    def finish(self) -> None:
        if self._header is None or self._obj is None:
            return
        try:
            self._header.check(self._key, self._obj.spec, _view(self._obj))
            self._whole = True
        except ChunkFormatError as error:
            self._damaged(error)

    def take(self) -> MemoryObj | None:
        """The chunk with one reference for the caller; None if it did not come whole. Once, at the end."""
        obj = self._obj if self._whole else None
        if obj is None:
            self.abandon()
        self._obj = None
        return obj

    def abandon(self) -> None:
        """Give back what came so far."""
        obj, self._obj, self._whole = self._obj, None, False
        if obj is not None:
            obj.ref_down()

    def _damaged(self, error: ChunkFormatError) -> None:
        self.failure, self.is_damaged = error.reason, True


def _view(obj: MemoryObj) -> memoryview:
    return obj.bytes.numpy().data
