"""A chunk as a value of a remote store: the header of :mod:`lmcache.storage.chunk_header`, then the payload."""

from __future__ import annotations

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj
from lmcache.storage.chunk_format import NO_KEY, ChunkFormat
from lmcache.storage.chunk_header import HEADER_BYTES, ChunkFormatError, ChunkHeader
from lmcache.storage.interface import Allocate
from lmcache.storage.remote.interface import Receiver

# Not the value's fault: another server may be able to read it.
_OURS = {NO_KEY, "no_codec"}


class ChunkReceiver(Receiver):
    """Reads the value of ``key`` into an object of its own. What it got is checked; see :meth:`take`."""

    head_bytes = HEADER_BYTES

    def __init__(self, format_: ChunkFormat, key: CacheKey, allocate: Allocate) -> None:
        self._format = format_
        self._key = key
        self._allocate = allocate
        self._header: ChunkHeader | None = None
        self._obj: MemoryObj | None = None
        self._packed: memoryview | None = None
        self._whole = False
        self.failure: str | None = None
        """Why a value that is there was not taken: a short word to count by."""
        self.is_damaged = False
        """Whether the value is at fault, so that it is better removed."""

    def begin(self, nbytes: int, head: memoryview) -> memoryview | None:
        self.abandon()  # a store that tried twice
        try:
            header = ChunkHeader.decode(bytes(head))
            if nbytes != HEADER_BYTES + header.payload_bytes:
                raise ChunkFormatError("size", f"{nbytes} bytes, of which {header.payload_bytes} are payload")
            self._format.check(header)
        except ChunkFormatError as error:
            self._refuse(error)
            return None
        self._obj = self._allocate(header.spec)
        if self._obj is None:
            self.failure = "no_memory"
            return None
        self._header = header
        self._packed = None if header.packing is None else memoryview(bytearray(header.packing.nbytes))
        return _view(self._obj) if self._packed is None else self._packed

    def finish(self) -> None:
        if self._header is None or self._obj is None:
            return
        payload = _view(self._obj) if self._packed is None else self._packed
        try:
            self._header.check(self._key, self._obj.spec, payload)
            if self._packed is not None:
                self._format.unpack(self._header, self._packed, self._obj)
            self._whole = True
        except ChunkFormatError as error:
            self._refuse(error)

    def take(self) -> MemoryObj | None:
        """The chunk with one reference for the caller; None if it did not come whole. Once, at the end."""
        obj = self._obj if self._whole else None
        if obj is None:
            self.abandon()
        self._obj = self._packed = None
        return obj

    def abandon(self) -> None:
        """Give back what came so far."""
        obj, self._obj, self._whole = self._obj, None, False
        if obj is not None:
            obj.ref_down()

    def _refuse(self, error: ChunkFormatError) -> None:
        self.failure, self.is_damaged = error.reason, error.reason not in _OURS


def _view(obj: MemoryObj) -> memoryview:
    return obj.bytes.numpy().data
