"""One chunk as a file: a 4096-byte header, then the payload padded to a multiple of 4096 bytes.

The header is :class:`~lmcache.storage.chunk_header.ChunkHeader`, the payload what
:class:`~lmcache.storage.chunk_format.ChunkFormat` makes of the chunk.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.chunk_header import ChunkFormatError, ChunkHeader
from lmcache.storage.disk.direct_io import BLOCK, O_DIRECT, aligned_buffer, read_all, round_up, write_all
from lmcache.storage.disk.packed import Packed
from lmcache.storage.interface import Allocate


def chunk_file_bytes(nbytes: int) -> int:
    """Length of the file that holds ``nbytes`` of payload."""
    return BLOCK + round_up(nbytes)


PLAIN = ChunkFormat()


def write_chunk(
    path: Path, key: CacheKey, obj: MemoryObj, *, direct: bool, fsync: bool, chunk_format: ChunkFormat = PLAIN
) -> Packed | None:
    """Write a new file at ``path``; on failure a part of it may be left. How the payload lies in it if it is not the
    chunk's bytes.

    Raises:
        OSError: the medium refused.
        ValueError: the spec is too long.
    """
    header, data = chunk_format.pack(key, obj)
    if data is None:
        padded = _padded(obj)
        # What follows the payload is left over from an earlier owner of the memory, perhaps another tenant's KV.
        padded[obj.spec.nbytes :].zero_()
        payload = _view(padded)
    else:
        payload = aligned_buffer(round_up(len(data)))
        payload[: len(data)] = data
    block = aligned_buffer()
    block[:] = header.encode()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (O_DIRECT if direct else 0), 0o600)
    try:
        write_all(fd, [block, payload])
        if fsync:
            os.fdatasync(fd)
    finally:
        os.close(fd)
    return None if header.packing is None else Packed.of(header.packing)


def read_chunk(
    path: Path,
    key: CacheKey,
    spec: KVSpec,
    allocate: Allocate,
    *,
    direct: bool,
    packed: Packed | None = None,
    chunk_format: ChunkFormat = PLAIN,
) -> MemoryObj:
    """Read ``path`` into a fresh object, of which the caller gets the one reference.

    ``key``, ``spec`` and ``packed`` are what the index says: only they decide how much is allocated, and only after
    the length of the file agreed with them.

    Raises:
        ChunkFormatError: the file holds something else; its ``reason`` says what.
        MemoryError: ``allocate`` had nothing to give.
        OSError: the medium failed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (O_DIRECT if direct else 0))
    try:
        size, expected = os.fstat(fd).st_size, chunk_file_bytes(spec.nbytes if packed is None else packed.nbytes)
        if size != expected:
            raise ChunkFormatError("size", f"file of {size} bytes, expected {expected}")
        if packed is None:
            return _read_plain(fd, key, spec, allocate, chunk_format)
        return _read_packed(fd, key, spec, packed, allocate, chunk_format)
    except EOFError as error:
        raise ChunkFormatError("size", str(error)) from None
    finally:
        os.close(fd)


def _read_plain(fd: int, key: CacheKey, spec: KVSpec, allocate: Allocate, chunk_format: ChunkFormat) -> MemoryObj:
    obj = _allocated(spec, allocate)
    try:
        block = aligned_buffer()
        read_all(fd, [block, _view(_padded(obj))])
        header = ChunkHeader.decode(bytes(block))
        if header.packing is not None:
            raise ChunkFormatError("packing", f"packed by {header.packing.codec!r}, of which the index does not know")
        chunk_format.check(header)
        header.check(key, spec, _view(obj.bytes))
    except BaseException:
        obj.ref_down()
        raise
    return obj


def _read_packed(
    fd: int, key: CacheKey, spec: KVSpec, packed: Packed, allocate: Allocate, chunk_format: ChunkFormat
) -> MemoryObj:
    block = aligned_buffer()
    read_all(fd, [block])
    header = ChunkHeader.decode(bytes(block))
    if header.packing is None or Packed.of(header.packing) != packed:
        raise ChunkFormatError("packing", f"packed as {header.packing}, expected {packed}")
    chunk_format.check(header)
    buffer = aligned_buffer(packed.nbytes)
    read_all(fd, [buffer], start=BLOCK)
    payload = buffer[: header.payload_bytes]
    header.check(key, spec, payload)
    obj = _allocated(spec, allocate)
    try:
        chunk_format.unpack(header, payload, obj)
    except BaseException:
        obj.ref_down()
        raise
    return obj


def _allocated(spec: KVSpec, allocate: Allocate) -> MemoryObj:
    obj = allocate(spec)
    if obj is None:
        raise MemoryError(f"no host memory for {spec.nbytes} bytes")
    return obj


def _padded(obj: MemoryObj) -> torch.Tensor:
    return obj.padded_bytes[: round_up(obj.spec.nbytes)]


def _view(data: torch.Tensor) -> memoryview:
    return data.numpy().data
