"""One chunk as a file: a 4096-byte header, then the payload padded to a multiple of 4096 bytes.

The header is :class:`~lmcache.storage.chunk_header.ChunkHeader`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from xxhash import xxh3_128_digest

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.chunk_header import ChunkFormatError, ChunkHeader
from lmcache.storage.disk.direct_io import BLOCK, O_DIRECT, aligned_buffer, read_all, round_up, write_all
from lmcache.storage.interface import Allocate


def chunk_file_bytes(nbytes: int) -> int:
    """Length of the file that holds ``nbytes`` of payload."""
    return BLOCK + round_up(nbytes)


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
        ChunkFormatError: the file holds something else; its ``reason`` says what.
        MemoryError: ``allocate`` had nothing to give.
        OSError: the medium failed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (O_DIRECT if direct else 0))
    try:
        size, expected = os.fstat(fd).st_size, chunk_file_bytes(spec.nbytes)
        if size != expected:
            raise ChunkFormatError("size", f"file of {size} bytes, expected {expected}")
        obj = allocate(spec)
        if obj is None:
            raise MemoryError(f"no host memory for {spec.nbytes} bytes")
        try:
            block = aligned_buffer()
            read_all(fd, [block, _view(_padded(obj))])
            header = ChunkHeader.decode(bytes(block))
            header.check(key, spec, _view(obj.bytes))
            if header.packing is not None:
                raise ChunkFormatError("packing", f"packed by {header.packing.codec!r}, which files are not")
        except EOFError as error:
            obj.ref_down()
            raise ChunkFormatError("size", str(error)) from None
        except BaseException:
            obj.ref_down()
            raise
    finally:
        os.close(fd)
    return obj


def _padded(obj: MemoryObj) -> torch.Tensor:
    return obj.padded_bytes[: round_up(obj.spec.nbytes)]


def _view(data: torch.Tensor) -> memoryview:
    return data.numpy().data
