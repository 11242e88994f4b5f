"""The negative control: a store whose chunks are whole, with right checksums, and false."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from xxhash import xxh3_128_digest

from lmcache.storage.chunk_header import HEADER_BYTES, ChunkHeader


def falsify(directory: Path) -> int:
    """Turn the sign of every key and value in a ``file://`` store, checksums kept right; the number of chunks."""
    count = 0
    for path in directory.rglob("p*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        header = ChunkHeader.decode(content[:HEADER_BYTES])
        payload = np.frombuffer(content[HEADER_BYTES:], np.uint8).copy()
        size = header.spec.dtype.itemsize
        payload[size - 1 :: size] ^= 0x80  # little-endian: the sign is last
        path.write_bytes(dataclasses.replace(header, checksum=xxh3_128_digest(payload)).encode() + payload.tobytes())
        count += 1
    return count
