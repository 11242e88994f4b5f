"""What an entry of the cache is called: two key types that never meet.

A key is its bytes: 16 bytes that name the *namespace* (everything that makes KV differ although the tokens
are the same) and 32 bytes of blake3 over the tokens. Nothing in it depends on the process, the host or the
hash seed, so restarts and other hosts agree.

- :class:`PrefixKey`: a chunk *and everything before it*. The digest of chunk ``i`` is blake3 keyed with the
  digest of chunk ``i - 1``; chunk 0 is keyed with the namespace.
- :class:`SegmentKey`: a run of tokens on its own, wherever it stands. Keyed with the namespace alone.

The two types start from different root keys, so equal tokens never give equal digests.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

NAMESPACE_BYTES = 16
DIGEST_BYTES = 32
KEY_BYTES = NAMESPACE_BYTES + DIGEST_BYTES

Tokens: TypeAlias = "Sequence[int] | torch.Tensor | npt.NDArray[np.integer]"
TokenArray: TypeAlias = "npt.NDArray[np.int32]"

_KeyT = TypeVar("_KeyT", bound="_Key")


class _Key(bytes):
    """Namespace id and digest. Bytes, so that hashing is cached and comparison is one ``memcmp``."""

    __slots__ = ()

    def __new__(cls: type[_KeyT], raw: bytes) -> _KeyT:
        if len(raw) != KEY_BYTES:
            raise ValueError(f"{cls.__name__} takes {KEY_BYTES} bytes, got {len(raw)}")
        return super().__new__(cls, raw)

    @property
    def namespace_id(self) -> bytes:
        return self[:NAMESPACE_BYTES]

    @property
    def digest(self) -> bytes:
        return self[NAMESPACE_BYTES:]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.namespace_id.hex()[:8]}…:{self.digest.hex()[:12]}…)"


class PrefixKey(_Key):
    """Names the KV of one chunk that follows one exact prefix."""

    __slots__ = ()


class SegmentKey(_Key):
    """Names the KV of a run of tokens computed without regard to where it will stand."""

    __slots__ = ()


CacheKey: TypeAlias = "PrefixKey | SegmentKey"


@dataclass(frozen=True)
class Namespace:
    """Everything besides the tokens that makes KV differ. Two that differ in any field never share an entry.

    ``model`` names the weights (name or path), ``revision`` pins them (commit, or a fingerprint of local
    files), ``model_config`` is a digest of the architecture settings (rope scaling, overrides, quantisation).
    ``layout`` is the host layout of the bytes and its version. ``shard`` is the part of the model that this
    process holds. ``lora`` and ``cache_salt`` isolate adapters and tenants.
    """

    model: str
    kv_dtype: str
    layout: str
    revision: str = ""
    model_config: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    lora: str = ""
    cache_salt: str = ""

    @cached_property
    def _root(self) -> bytes:
        # Sorted JSON of named fields: unambiguous (no two field splits read alike) and stable.
        return blake3(msgspec.json.encode(asdict(self), order="sorted")).digest()

    @cached_property
    def id(self) -> bytes:
        """16 bytes that stand in front of every key of this namespace."""
        return self._root[:NAMESPACE_BYTES]

    @cached_property
    def prefix_root(self) -> bytes:
        return blake3(b"prefix", key=self._root).digest()

    @cached_property
    def segment_root(self) -> bytes:
        return blake3(b"segment", key=self._root).digest()


def token_array(tokens: Tokens) -> TokenArray:
    """Token ids as a contiguous int32 array, the bytes that are hashed.

    Raises:
        ValueError: a token is negative or does not fit 31 bits, or ``tokens`` is not one-dimensional.
    """
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.detach().cpu().numpy()
    if isinstance(tokens, np.ndarray):
        return _checked_int32(tokens)
    # `struct` packs a list of ints about three times as fast as numpy reads it.
    count = len(tokens)
    try:
        packed = struct.pack(f"<{count}i", *tokens)
    except struct.error as error:
        raise ValueError(f"token ids must be integers in 0 … 2³¹−1: {error}") from None
    array = np.frombuffer(packed, dtype=np.int32)
    if count and array.min() < 0:
        raise ValueError(f"token ids must be integers in 0 … 2³¹−1, got {array.min()}")
    return array


def _checked_int32(array: npt.NDArray[np.integer]) -> TokenArray:
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"tokens must be a 1-D array of integers, got {array.dtype} of shape {array.shape}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"token ids must be integers in 0 … 2³¹−1, got {array.min()} … {array.max()}")
    return np.ascontiguousarray(array, dtype=np.int32)


def prefix_keys(
    namespace: Namespace,
    tokens: Tokens,
    chunk_size: int,
    *,
    parent: PrefixKey | None = None,
    include_partial: bool = False,
) -> list[PrefixKey]:
    """Keys of the consecutive chunks of ``tokens``, in order.

    Args:
        parent: key of the chunk that stands before ``tokens``; None at the start of a prompt. Passing it lets a
            caller go on where it stopped instead of hashing a growing prompt again.
        include_partial: also give a key for a last chunk of fewer than ``chunk_size`` tokens.
    """
    data = memoryview(token_array(tokens)).cast("B")
    step = chunk_size * 4
    end = len(data) if include_partial else len(data) - len(data) % step
    digest = namespace.prefix_root if parent is None else parent.digest
    space = namespace.id
    keys = []
    for start in range(0, end, step):
        digest = blake3(data[start : min(start + step, end)], key=digest).digest()
        keys.append(PrefixKey(space + digest))
    return keys


def segment_key(namespace: Namespace, tokens: Tokens) -> SegmentKey:
    """Key of ``tokens`` as a passage of its own."""
    data = memoryview(token_array(tokens)).cast("B")
    return SegmentKey(namespace.id + blake3(data, key=namespace.segment_root).digest())
