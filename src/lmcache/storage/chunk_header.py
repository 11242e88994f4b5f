"""What stands in front of a chunk's bytes, on disk and in remote stores: 4096 bytes that say what follows.

Little-endian: magic, format version, kind of key, length of the spec, payload bytes, key, checksum of the payload
(xxh3_128), spec as JSON, zeros, and in the last 16 bytes the checksum of everything before them. Checksums find torn,
truncated and flipped bytes; they do not defend against someone who writes chunks on purpose.

Version 1 has the chunk's bytes as payload. Version 2 has them packed by a codec, encrypted, or both: the JSON says how.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated

import msgspec
from xxhash import xxh3_128_digest

from lmcache.keys import KEY_BYTES, CacheKey
from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.spec_codec import decode_key, decode_spec, encode_spec, key_kind

HEADER_BYTES = 4096
PLAIN_VERSION, PACKED_VERSION = 1, 2
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


class Packing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a payload differs from the chunk's bytes. ``key_id`` names the key that it is encrypted with, if it is."""

    codec: Annotated[str, msgspec.Meta(max_length=32)]
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
    key_id: Annotated[str, msgspec.Meta(max_length=64)] = ""
    nonce: Annotated[bytes, msgspec.Meta(max_length=32)] = b""


class _PackedRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    spec: msgspec.Raw
    packing: Packing


_packed_decoder = msgspec.json.Decoder(_PackedRecord)


@dataclass(frozen=True)
class ChunkHeader:
    """What stands in front of a payload. ``checksum`` is xxh3_128 of the payload without its padding; ``packing`` is
    None where the payload is the chunk's bytes."""

    key: CacheKey
    spec: KVSpec
    checksum: bytes
    packing: Packing | None = None

    @property
    def payload_bytes(self) -> int:
        return self.spec.nbytes if self.packing is None else self.packing.nbytes

    @property
    def sealed_fields(self) -> bytes:
        """What an encrypted payload vouches for besides itself."""
        return bytes([key_kind(self.key)]) + bytes(self.key) + self._record()

    def encode(self) -> bytes:
        """4096 bytes.

        Raises:
            ValueError: the spec is longer than the header has room for.
        """
        record = self._record()
        if len(record) > MAX_SPEC_BYTES:
            raise ValueError(f"spec takes {len(record)} bytes, a chunk header has room for {MAX_SPEC_BYTES}")
        version = PLAIN_VERSION if self.packing is None else PACKED_VERSION
        fields = _FIELDS.pack(
            _MAGIC, version, key_kind(self.key), len(record), self.payload_bytes, self.key, self.checksum
        )
        block = (fields + record).ljust(_SEAL, b"\0")
        return block + xxh3_128_digest(block)

    def _record(self) -> bytes:
        spec = encode_spec(self.spec)
        if self.packing is None:
            return spec
        return msgspec.json.encode(_PackedRecord(msgspec.Raw(spec), self.packing))

    @classmethod
    def decode(cls, block: bytes) -> ChunkHeader:
        """Raises:
        ChunkFormatError: ``block`` is not a sound header of a version that we know.
        """
        if len(block) != HEADER_BYTES:
            raise ChunkFormatError("size", f"header of {len(block)} bytes")
        magic, version, kind, record_len, nbytes, key, checksum = _FIELDS.unpack_from(block)
        if magic != _MAGIC:
            raise ChunkFormatError("magic", "not a chunk")
        if version not in (PLAIN_VERSION, PACKED_VERSION):
            raise ChunkFormatError("version", f"format version {version}, this program reads up to {PACKED_VERSION}")
        if xxh3_128_digest(block[:_SEAL]) != block[_SEAL:]:
            raise ChunkFormatError("header", "checksum of the header is wrong")
        if record_len > MAX_SPEC_BYTES:
            raise ChunkFormatError("spec", f"spec of {record_len} bytes")
        record = block[_FIELDS.size :][:record_len]
        try:
            packing = None
            if version == PACKED_VERSION:
                packed = _packed_decoder.decode(record)
                record, packing = bytes(packed.spec), packed.packing
            header = cls(decode_key(kind, key), decode_spec(record), checksum, packing)
        except ValueError as error:
            raise ChunkFormatError("spec", str(error)) from None
        if header.payload_bytes != nbytes:
            raise ChunkFormatError("spec", f"{nbytes} bytes of payload, but its spec means {header.payload_bytes}")
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
