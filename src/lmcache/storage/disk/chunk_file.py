"""One chunk as a file: a 4096-byte header, then the payload padded to a multiple of 4096 bytes.

Header, little-endian: magic, format version, kind of key, length of the spec, payload bytes, key, checksum of the
payload (xxh3_128), spec as JSON, zeros, and in its last 16 bytes the checksum of everything before them. Checksums
find torn, truncated and flipped bytes; they do not defend against someone who writes files here on purpose.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from xxhash import xxh3_128_digest

from lmcache.keys import KEY_BYTES, CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.disk.codec import decode_key, decode_spec, encode_spec, key_kind
from lmcache.storage.disk.direct_io import BLOCK, O_DIRECT, aligned_buffer, read_all, round_up, write_all
from lmcache.storage.interface import Allocate

FORMAT_VERSION = 1
_MAGIC = b"LMCCHUNK"
_CHECKSUM_BYTES = 16
_FIELDS = struct.Struct(f"<8sHHIQ{KEY_BYTES}s{_CHECKSUM_BYTES}s")
_SEAL = BLOCK - _CHECKSUM_BYTES
MAX_SPEC_BYTES = _SEAL - _FIELDS.size


class ChunkFileError(Exception):
    """The file does not hold what the index says. ``reason`` is a short word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def chunk_file_bytes(nbytes: int) -> int:
    """Length of the file that holds ``nbytes`` of payload."""
    return BLOCK + round_up(nbytes)


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
        ChunkFileError: ``block`` is not a sound header of a version that we know.
        """
        if len(block) != BLOCK:
            raise ChunkFileError("size", f"header of {len(block)} bytes")
        magic, version, kind, spec_len, nbytes, key, checksum = _FIELDS.unpack_from(block)
        if magic != _MAGIC:
            raise ChunkFileError("magic", "not a chunk file")
        if version != FORMAT_VERSION:
            raise ChunkFileError("version", f"format version {version}, this program reads {FORMAT_VERSION}")
        if xxh3_128_digest(block[:_SEAL]) != block[_SEAL:]:
            raise ChunkFileError("header", "checksum of the header is wrong")
        if spec_len > MAX_SPEC_BYTES:
            raise ChunkFileError("spec", f"spec of {spec_len} bytes")
        try:
            header = cls(decode_key(kind, key), decode_spec(block[_FIELDS.size :][:spec_len]), checksum)
        except ValueError as error:
            raise ChunkFileError("spec", str(error)) from None
        if header.spec.nbytes != nbytes:
            raise ChunkFileError("spec", f"{nbytes} bytes of payload, but its spec means {header.spec.nbytes}")
        return header


def write_chunk(path: Path, key: CacheKey, obj: MemoryObj, *, direct: bool, fsync: bool) -> None:
    """Write a new file at ``path``. On failure a part of it may be left.

    Raises:
        OSError: the medium refused.
        ValueError: the spec is too long.
    """
    payload = _padded(obj)
    # What follows the payload is left over from an earlier owner of the memory, perhaps another tenant's KV.
    payload[obj.spec.nbytes :].zero_()
    header = aligned_buffer()
    header[:] = ChunkHeader(key, obj.spec, xxh3_128_digest(_view(obj.bytes))).encode()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (O_DIRECT if direct else 0), 0o600)
    try:
        write_all(fd, [header, _view(payload)])
        if fsync:
            os.fdatasync(fd)
    finally:
        os.close(fd)


def read_chunk(path: Path, key: CacheKey, spec: KVSpec, allocate: Allocate, *, direct: bool) -> MemoryObj:
    """Read ``path`` into a fresh object, of which the caller gets the one reference.

    ``key`` and ``spec`` are what the index says: only ``spec`` decides how much is allocated, and only after the
    length of the file agreed with it.

    Raises:
        ChunkFileError: the file holds something else; its ``reason`` says what.
        MemoryError: ``allocate`` had nothing to give.
        OSError: the medium failed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (O_DIRECT if direct else 0))
    try:
        size, expected = os.fstat(fd).st_size, chunk_file_bytes(spec.nbytes)
        if size != expected:
            raise ChunkFileError("size", f"file of {size} bytes, expected {expected}")
        obj = allocate(spec)
        if obj is None:
            raise MemoryError(f"no host memory for {spec.nbytes} bytes")
        try:
            block = aligned_buffer()
            read_all(fd, [block, _view(_padded(obj))])
            _check(ChunkHeader.decode(bytes(block)), key, obj)
        except EOFError as error:
            obj.ref_down()
            raise ChunkFileError("size", str(error)) from None
        except BaseException:
            obj.ref_down()
            raise
    finally:
        os.close(fd)
    return obj


def _check(header: ChunkHeader, key: CacheKey, obj: MemoryObj) -> None:
    if header.key != key or type(header.key) is not type(key):
        raise ChunkFileError("key", f"file of {header.key!r}, expected {key!r}")
    if header.spec != obj.spec:
        raise ChunkFileError("spec", f"file of {header.spec}, expected {obj.spec}")
    if xxh3_128_digest(_view(obj.bytes)) != header.checksum:
        raise ChunkFileError("checksum", "checksum of the payload is wrong")


def _padded(obj: MemoryObj) -> torch.Tensor:
    return obj.padded_bytes[: round_up(obj.spec.nbytes)]


def _view(data: torch.Tensor) -> memoryview:
    return data.numpy().data
