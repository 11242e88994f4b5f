"""Keys and :class:`KVSpec` as bytes, for chunk headers and the index. Decoding trusts nothing."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from lmcache.keys import KEY_BYTES, CacheKey, PrefixKey, SegmentKey
from lmcache.memory.memory_obj import KVSpec

_KEY_TYPES: tuple[type[PrefixKey] | type[SegmentKey], ...] = (PrefixKey, SegmentKey)
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}

_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class _SpecRecord(msgspec.Struct, forbid_unknown_fields=True):
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(min_length=1, max_length=8)]
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    layout: Annotated[str, msgspec.Meta(max_length=1024)]
    num_tokens: _Size


_decoder = msgspec.json.Decoder(_SpecRecord)


def encode_spec(spec: KVSpec) -> bytes:
    """JSON of ``spec``."""
    dtype = str(spec.dtype).removeprefix("torch.")
    return msgspec.json.encode(_SpecRecord(spec.shape, dtype, spec.layout, spec.num_tokens))


def decode_spec(raw: bytes) -> KVSpec:
    """Raises:
    ValueError: ``raw`` is not what :func:`encode_spec` writes.
    """
    # msgspec's errors are ValueErrors, malformed UTF-8 included.
    record = _decoder.decode(raw)
    dtype = _DTYPES.get(record.dtype)
    if dtype is None:
        raise ValueError(f"unknown dtype {record.dtype!r}")
    return KVSpec(record.shape, dtype, record.layout, record.num_tokens)


def key_kind(key: CacheKey) -> int:
    """The number that stands for the type of ``key``."""
    return _KEY_TYPES.index(type(key))


def decode_key(kind: int, raw: bytes) -> CacheKey:
    """Raises:
    ValueError: no such kind of key, or the wrong number of bytes.
    """
    if not 0 <= kind < len(_KEY_TYPES) or len(raw) != KEY_BYTES:
        raise ValueError(f"no key of kind {kind} with {len(raw)} bytes")
    return _KEY_TYPES[kind](raw)
