"""The negative control: KV that is whole, with right checksums, and false."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np
from xxhash import xxh3_128_digest

from lmcache.storage.chunk_header import ChunkHeader
from lmcache.storage.disk.direct_io import BLOCK


def falsify(directory: Path, *, but: Collection[Path] = ()) -> int:
    """Turn the sign of every stored key and value; the number of chunks. No server may use ``directory`` meanwhile.

    A server that loads such chunks must give other text; one whose text stays the same did not use what it loaded.
    ``but``: files that stay as they are.
    """
    files = sorted(set(directory.rglob("*.kv")).difference(but))
    for path in files:
        content = path.read_bytes()
        header = ChunkHeader.decode(content[:BLOCK])
        values = np.frombuffer(content[BLOCK : BLOCK + header.spec.nbytes], np.uint8).copy()
        values[header.spec.dtype.itemsize - 1 :: header.spec.dtype.itemsize] ^= 0x80  # little-endian: the sign is last
        false = dataclasses.replace(header, checksum=xxh3_128_digest(values))
        padding = content[BLOCK + header.spec.nbytes :]
        path.write_bytes(false.encode() + values.tobytes() + padding)
    return len(files)
