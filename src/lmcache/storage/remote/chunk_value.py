"""A chunk as a value of a remote store: the header of :mod:`lmcache.storage.chunk_header`, then the payload."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from xxhash import xxh3_128_digest

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.chunk_header import HEADER_BYTES, ChunkFormatError, ChunkHeader, Packing
from lmcache.storage.codecs import CODEC_NAMES, make_codec
from lmcache.storage.codecs.interface import Codec, CodecError
from lmcache.storage.codecs.raw import RawCodec
from lmcache.storage.interface import Allocate
from lmcache.storage.remote.interface import Receiver

if TYPE_CHECKING:
    from lmcache.storage.encryption import KeyRing

_ENCRYPTION_BYTES = 16


class ChunkFormat:
    """How this server writes chunks, and which ones it reads: exact ones however packed, others only if it writes them
    so itself, encrypted ones if it has the key."""

    def __init__(self, codec: Codec | None = None, keys: KeyRing | None = None) -> None:
        self._codec = codec or RawCodec()
        self._keys = keys

    @property
    def tag(self) -> str:
        """Part of the names of values: what is not exact must not meet who expects it to be."""
        return "" if self._codec.is_exact else f"-{self._codec.name}"

    def encode(self, key: CacheKey, obj: MemoryObj) -> tuple[memoryview, ...]:
        """The parts of the value. They may lie in ``obj``, which must be held until they were sent.

        Raises:
            ValueError: the spec is longer than the header has room for.
        """
        packed = self._codec.encode(obj.tensor, obj.spec) if self._codec.takes(obj.spec) else None
        if packed is None and self._keys is None:
            payload = _view(obj)
            return memoryview(ChunkHeader(key, obj.spec, xxh3_128_digest(payload)).encode()), payload
        data: memoryview | bytes = _view(obj) if packed is None else packed
        packing = Packing(RawCodec.name if packed is None else self._codec.name, len(data))
        if self._keys is not None:
            from lmcache.storage.encryption import new_nonce

            packing = Packing(packing.codec, len(data) + _ENCRYPTION_BYTES, self._keys.current, new_nonce())
            data = self._keys.encrypt(data, packing.nonce, ChunkHeader(key, obj.spec, b"", packing).sealed_fields)
        return memoryview(ChunkHeader(key, obj.spec, xxh3_128_digest(data), packing).encode()), memoryview(data)

    def seal(self, data: bytes, name: str) -> bytes:
        """A small value of that name, encrypted if there is a key."""
        if self._keys is None:
            return data
        from lmcache.storage.encryption import new_nonce

        nonce = new_nonce()
        sealed = self._keys.encrypt(data, nonce, name.encode())
        return msgspec.msgpack.encode((self._keys.current, nonce, sealed))

    def unseal(self, value: bytes, name: str) -> bytes | None:
        """What :meth:`seal` was given; None for what we cannot read."""
        if self._keys is None:
            return value
        from lmcache.storage.encryption import UnknownKeyError

        try:
            key_id, nonce, sealed = msgspec.msgpack.decode(value, type=tuple[str, bytes, bytes])
            return self._keys.decrypt(key_id, sealed, nonce, name.encode())
        except (ValueError, UnknownKeyError):  # msgspec's errors are the former
            return None

    def receiver(self, key: CacheKey, allocate: Allocate) -> ChunkReceiver:
        return ChunkReceiver(self, key, allocate)

    def max_bytes(self, packing: Packing, spec: KVSpec) -> int:
        """What a payload packed so may be long.

        Raises:
            ChunkFormatError: we do not read it.
        """
        codec = self._reads(packing)
        if not codec.takes(spec):
            raise ChunkFormatError("codec", f"codec {codec.name!r} does not pack chunks of {spec}")
        return codec.max_bytes(spec) + (_ENCRYPTION_BYTES if packing.key_id else 0)

    def unpack(self, header: ChunkHeader, payload: memoryview, obj: MemoryObj) -> None:
        """Fill ``obj`` with the chunk.

        Raises:
            ChunkFormatError: it is not what it should be.
        """
        packing = header.packing
        assert packing is not None
        data: memoryview = payload
        if packing.key_id:
            data = memoryview(self._decrypted(header, packing, payload))
        codec = self._reads(packing)
        if isinstance(codec, RawCodec):
            if data.nbytes != obj.spec.nbytes:
                raise ChunkFormatError("size", f"{data.nbytes} bytes, expected {obj.spec.nbytes}")
            _view(obj)[:] = data
            return
        try:
            codec.decode(data, obj.tensor, obj.spec)
        except CodecError as error:
            raise ChunkFormatError("codec", str(error)) from error

    def _decrypted(self, header: ChunkHeader, packing: Packing, payload: memoryview) -> bytes:
        from lmcache.storage.encryption import UnknownKeyError

        if self._keys is None:
            raise ChunkFormatError("no_key", "it is encrypted, and there is no encryption key")
        try:
            return self._keys.decrypt(packing.key_id, payload, packing.nonce, header.sealed_fields)
        except UnknownKeyError as error:
            raise ChunkFormatError("no_key", str(error)) from error

    def _reads(self, packing: Packing) -> Codec:
        if packing.codec == self._codec.name:
            return self._codec
        if packing.codec not in CODEC_NAMES:
            raise ChunkFormatError("codec", f"unknown codec {packing.codec!r}")
        try:
            codec = make_codec(packing.codec)
        except ValueError as error:
            raise ChunkFormatError("no_codec", str(error)) from error
        if not codec.is_exact:
            raise ChunkFormatError("codec", f"written by {codec.name!r}, which is not exact")
        return codec


# Not the value's fault: another server may be able to read it.
_OURS = {"no_key", "no_codec"}


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
            if header.spec.nbytes == 0:
                raise ChunkFormatError("spec", f"an empty chunk of {header.spec}")
            packing = header.packing
            if packing is not None and packing.nbytes > self._format.max_bytes(packing, header.spec):
                raise ChunkFormatError("size", f"{packing.nbytes} packed bytes of {header.spec.nbytes}")
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
