"""How a chunk is written where it leaves host memory: packed by a codec, encrypted, both or neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from xxhash import xxh3_128_digest

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.chunk_header import ChunkFormatError, ChunkHeader, Packing
from lmcache.storage.codecs import CODEC_NAMES, make_codec
from lmcache.storage.codecs.interface import Codec, CodecError
from lmcache.storage.codecs.raw import RawCodec

if TYPE_CHECKING:
    from lmcache.storage.encryption import KeyRing

_ENCRYPTION_BYTES = 16

NO_KEY, PLAINTEXT = "no_key", "plaintext"
_REFUSALS = {
    NO_KEY: "it is encrypted with a key that is not here",
    PLAINTEXT: "it is not encrypted, and here everything must be",
}


class ChunkFormat:
    """How this server writes chunks, and which ones it reads: exact ones however packed, others only if it writes them
    so itself, encrypted ones if it has the key. With a key it reads nothing that is not encrypted: who can write there,
    but has no key, is believed nothing. Thread-safe."""

    def __init__(self, codec: Codec | None = None, keys: KeyRing | None = None) -> None:
        self._codec = codec or RawCodec()
        self._keys = keys

    @property
    def tag(self) -> str:
        """Part of the names of values: what is not exact must not meet who expects it to be."""
        return "" if self._codec.is_exact else f"-{self._codec.name}"

    @property
    def is_plain(self) -> bool:
        """Whether every chunk is written as it is."""
        return self._keys is None and isinstance(self._codec, RawCodec)

    @property
    def key_id(self) -> str:
        """Of the key that encrypts; empty where there is none."""
        return "" if self._keys is None else self._keys.current

    def refusal(self, key_id: str) -> str | None:
        """Why a payload encrypted with the key of that id (empty: with none) is not read, in a word to count by; None
        if it is."""
        if self._keys is None:
            return NO_KEY if key_id else None
        if not key_id:
            return PLAINTEXT
        return None if key_id in self._keys else NO_KEY

    def max_payload(self, spec: KVSpec) -> int:
        """Longer than this is no payload that :meth:`pack` makes."""
        packed = self._codec.max_bytes(spec) if self._codec.takes(spec) else 0
        return max(spec.nbytes, packed) + (_ENCRYPTION_BYTES if self._keys is not None else 0)

    def encode(self, key: CacheKey, obj: MemoryObj) -> tuple[memoryview, ...]:
        """Header and payload. They may lie in ``obj``, which must be held until they were sent.

        Raises:
            ValueError: the spec is longer than the header has room for.
        """
        header, data = self.pack(key, obj)
        return memoryview(header.encode()), _view(obj) if data is None else memoryview(data)

    def pack(self, key: CacheKey, obj: MemoryObj) -> tuple[ChunkHeader, memoryview | bytes | None]:
        """The header, and the payload where it differs from the chunk's bytes."""
        packed = self._codec.encode(obj.tensor, obj.spec) if self._codec.takes(obj.spec) else None
        if packed is None and self._keys is None:
            return ChunkHeader(key, obj.spec, xxh3_128_digest(_view(obj))), None
        codec = RawCodec.name if packed is None else self._codec.name
        data: memoryview | bytes = _view(obj) if packed is None else packed
        packing = Packing(codec, len(data))
        if self._keys is not None:
            from lmcache.storage.encryption import new_nonce

            packing = Packing(codec, len(data) + _ENCRYPTION_BYTES, self._keys.current, new_nonce())
            data = self._keys.encrypt(data, packing.nonce, ChunkHeader(key, obj.spec, b"", packing).sealed_fields)
        return ChunkHeader(key, obj.spec, xxh3_128_digest(data), packing), data

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
        from lmcache.storage.encryption import TamperedError, UnknownKeyError

        try:
            key_id, nonce, sealed = msgspec.msgpack.decode(value, type=tuple[str, bytes, bytes])
            return self._keys.decrypt(key_id, sealed, nonce, name.encode())
        except (ValueError, UnknownKeyError, TamperedError):  # msgspec's errors are the former
            return None

    def check(self, header: ChunkHeader) -> None:
        """To be called before memory is taken for a chunk.

        Raises:
            ChunkFormatError: we do not read it, or its payload is longer than such a one can be.
        """
        packing, spec = header.packing, header.spec
        if spec.nbytes == 0:
            raise ChunkFormatError("spec", f"an empty chunk of {spec}")
        if (refusal := self.refusal("" if packing is None else packing.key_id)) is not None:
            raise ChunkFormatError(refusal, _REFUSALS[refusal])
        if packing is None:
            return
        codec = self._reads(packing)
        if not codec.takes(spec):
            raise ChunkFormatError("codec", f"codec {codec.name!r} does not pack chunks of {spec}")
        if packing.nbytes > codec.max_bytes(spec) + (_ENCRYPTION_BYTES if packing.key_id else 0):
            raise ChunkFormatError("size", f"{packing.nbytes} packed bytes of {spec.nbytes}")

    def unpack(self, header: ChunkHeader, payload: memoryview, obj: MemoryObj) -> None:
        """Fill ``obj`` with the chunk whose ``header`` was packed. What is checked before is what :meth:`check` and
        :meth:`ChunkHeader.check` do.

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
        from lmcache.storage.encryption import TamperedError, UnknownKeyError

        try:
            if self._keys is None:
                raise UnknownKeyError("it is encrypted, and there is no encryption key")
            return self._keys.decrypt(packing.key_id, payload, packing.nonce, header.sealed_fields)
        except UnknownKeyError as error:
            raise ChunkFormatError(NO_KEY, str(error)) from error
        except TamperedError as error:
            raise ChunkFormatError("tampered", str(error)) from error

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


def _view(obj: MemoryObj) -> memoryview:
    return obj.bytes.numpy().data
