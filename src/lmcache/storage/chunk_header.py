"""What stands in front of a chunk's bytes, on disk and in remote stores: 4096 bytes that say what follows.

Little-endian: magic, format version, kind of key, length of the spec, payload bytes, key, checksum of the payload
(xxh3_128), spec as JSON, zeros, and in the last 16 bytes the checksum of everything before them. Checksums find torn,
truncated and flipped bytes; they do not defend against someone who writes chunks on purpose.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from xxhash import xxh3_128_digest

from lmcache.keys import KEY_BYTES, CacheKey
from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.spec_codec import decode_key, decode_spec, encode_spec, key_kind

HEADER_BYTES = 4096
FORMAT_VERSION = 1
_MAGIC = b"LMCCHUNK"
_CHECKSUM_BYTES = 16
_FIELDS = struct.Struct(f"<8sHHIQ{KEY_BYTES}s{_CHECKSUM_BYTES}s")
_SEAL = HEADER_BYTES - _CHECKSUM_BYTES
MAX_SPEC_BYTES = _SEAL - _FIELDS.size


class ChunkFormatError(Exception):
    """Not the chunk that it should be. ``reason`` is a short word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class ChunkHeader:
    """What stands in front of a payload. ``checksum`` is xxh3_128 of the payload without its padding."""

    key: CacheKey
    spec: KVSpec
    checksum: bytes

    def encode(self) -> bytes:
        """4096 bytes.

        Raises:
            ValueError: the spec is longer than the header has room for.
        """
        spec = encode_spec(self.spec)
        if len(spec) > MAX_SPEC_BYTES:
            raise ValueError(f"spec takes {len(spec)} bytes, a chunk header has room for {MAX_SPEC_BYTES}")
        fields = _FIELDS.pack(
            _MAGIC, FORMAT_VERSION, key_kind(self.key), len(spec), self.spec.nbytes, self.key, self.checksum
        )
        block = (fields + spec).ljust(_SEAL, b"\0")
        return block + xxh3_128_digest(block)

    @classmethod
    def decode(cls, block: bytes) -> ChunkHeader:
        """Raises:
        ChunkFormatError: ``block`` is not a sound header of a version that we know.
        """
        if len(block) != HEADER_BYTES:
            raise ChunkFormatError("size", f"header of {len(block)} bytes")
        magic, version, kind, spec_len, nbytes, key, checksum = _FIELDS.unpack_from(block)
        if magic != _MAGIC:
            raise ChunkFormatError("magic", "not a chunk")
        if version != FORMAT_VERSION:
            raise ChunkFormatError("version", f"format version {version}, this program reads {FORMAT_VERSION}")
        if xxh3_128_digest(block[:_SEAL]) != block[_SEAL:]:
            raise ChunkFormatError("header", "checksum of the header is wrong")
        if spec_len > MAX_SPEC_BYTES:
            raise ChunkFormatError("spec", f"spec of {spec_len} bytes")
        try:
            header = cls(decode_key(kind, key), decode_spec(block[_FIELDS.size :][:spec_len]), checksum)
        except ValueError as error:
            raise ChunkFormatError("spec", str(error)) from None
        if header.spec.nbytes != nbytes:
            raise ChunkFormatError("spec", f"{nbytes} bytes of payload, but its spec means {header.spec.nbytes}")
        return header

    def check(self, key: CacheKey, spec: KVSpec, payload: memoryview) -> None:
        """Raises:
        ChunkFormatError: ``payload`` is not the chunk ``key`` of ``spec``; the reason says in what.
        """
        if self.key != key or type(self.key) is not type(key):
            raise ChunkFormatError("key", f"chunk of {self.key!r}, expected {key!r}")
        if self.spec != spec:
            raise ChunkFormatError("spec", f"chunk of {self.spec}, expected {spec}")
        if xxh3_128_digest(payload) != self.checksum:
            raise ChunkFormatError("checksum", "checksum of the payload is wrong")
