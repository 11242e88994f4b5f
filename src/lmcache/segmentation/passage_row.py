"""What is kept of a chunk so that its tokens can be found in any prompt, and how it is written down."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from lmcache.keys import CacheKey, PrefixKey, SegmentKey


class PassageRow(NamedTuple):
    """A chunk: its tokens, the position of the first in its prompt, the chunk before it, and the offsets in it at which
    passages begin."""

    key: CacheKey
    tokens: npt.NDArray[np.uint32]
    start: int
    before: CacheKey | None
    seams: tuple[int, ...]


class _Stored(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    is_prefix: bool
    tokens: bytes
    start: int
    before: bytes
    before_is_prefix: bool
    seams: tuple[int, ...]


def encode_row(row: PassageRow) -> tuple[bytes, bytes, bytes]:
    """Key, data, and a digest over both."""
    stored = _Stored(
        is_prefix=isinstance(row.key, PrefixKey),
        tokens=row.tokens.astype("<u4").tobytes(),
        start=int(row.start),
        before=bytes(row.before or b""),
        before_is_prefix=isinstance(row.before, PrefixKey),
        seams=tuple(map(int, row.seams)),
    )
    key, data = bytes(row.key), msgspec.msgpack.encode(stored)
    return key, data, blake3(key + data).digest()


def decode_row(key: object, row: object, digest: object) -> PassageRow | None:
    """What :func:`encode_row` was given; None for what is not as it was written."""
    if not (isinstance(key, bytes) and isinstance(row, bytes)) or blake3(key + row).digest() != digest:
        return None
    try:
        stored = msgspec.msgpack.decode(row, type=_Stored)
        return PassageRow(
            _key(key, stored.is_prefix),
            np.frombuffer(stored.tokens, "<u4"),
            stored.start,
            _key(stored.before, stored.before_is_prefix) if stored.before else None,
            stored.seams,
        )
    except ValueError:  # msgspec's errors are
        return None


def _key(raw: bytes, is_prefix: bool) -> CacheKey:
    return PrefixKey(raw) if is_prefix else SegmentKey(raw)
