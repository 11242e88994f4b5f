"""What an entry of the cache is called: two key types that never meet.

A key is its bytes: 16 bytes that name the *namespace* (everything that makes KV differ although the tokens
are the same) and 32 bytes of blake3 over the tokens. Nothing in it depends on the process, the host or the
hash seed, so restarts and other hosts agree.

- :class:`PrefixKey`: a chunk *and everything before it*. The digest of chunk ``i`` is blake3 keyed with the
  digest of chunk ``i - 1``; chunk 0 is keyed with the namespace.
- :class:`SegmentKey`: a run of tokens on its own, wherever it stands. Keyed with the namespace alone.

Digests are keyed with the namespace *of the whole model*: the shards of one model hash alike, so a prompt is hashed
once for all of them, and only the 16 bytes in front tell one shard from another.

The two types start from different root keys, so equal tokens never give equal digests.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial, reduce
from operator import xor
from typing import NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

NAMESPACE_BYTES = 16
DIGEST_BYTES = 32
KEY_BYTES = NAMESPACE_BYTES + DIGEST_BYTES

Tokens: TypeAlias = "Sequence[int] | torch.Tensor | npt.NDArray[np.integer]"

_KeyT = TypeVar("_KeyT", bound="_Key")

_UINT32 = np.dtype("<u4")


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

    def of_shard(self: _KeyT, namespace: Namespace) -> _KeyT:
        """The key of the same tokens in ``namespace``, which differs from this key's in its shard alone."""
        return type(self)(namespace.id + self.digest)

    def moved(self: _KeyT, shard: Shard, other: Shard) -> _KeyT:
        """The key of the same tokens in the shard ``other``, for a key of ``shard``."""
        return type(self)(_xor(self.namespace_id, shard.code, other.code) + self.digest)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.namespace_id.hex()[:8]}…:{self.digest.hex()[:12]}…)"


class PrefixKey(_Key):
    """Names the KV of one chunk that follows one exact prefix."""

    __slots__ = ()


class SegmentKey(_Key):
    """Names the KV of a run of tokens computed without regard to where it will stand."""

    __slots__ = ()


CacheKey: TypeAlias = "PrefixKey | SegmentKey"


class Shard(NamedTuple):
    """Part ``tp_rank`` of ``tp_size`` equal parts of the KV heads, stage ``pp_rank`` of ``pp_size`` of the layers."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    @classmethod
    def of_heads(cls, tp_rank: int, tp_size: int, num_kv_heads: int) -> Shard:
        """What a rank has of ``num_kv_heads`` heads in all. Where there are more ranks than heads (MLA has one), some
        have the same."""
        parts = min(tp_size, num_kv_heads)
        return cls(tp_rank * parts // tp_size, parts)

    @property
    def code(self) -> bytes:
        """As long as a namespace's id; zeros for a whole model.

        Raises:
            ValueError: there are more than 256 ranks of a kind.
        """
        try:
            return bytes((self.tp_rank, self.tp_size - 1, self.pp_rank, self.pp_size - 1)).rjust(NAMESPACE_BYTES, b"\0")
        except ValueError:
            raise ValueError(f"{self}: a rank is 0 … size − 1, and a size is 1 … 256") from None


def _xor(*rows: bytes) -> bytes:
    """Of rows of equal length."""
    return reduce(xor, (int.from_bytes(row, "big") for row in rows)).to_bytes(len(rows[0]), "big")


@dataclass(frozen=True)
class Namespace:
    """Everything besides the tokens that makes KV differ. Two that differ in any field never share an entry.

    ``model`` names the weights (name or path), ``revision`` pins them (commit, or a fingerprint of local
    files), ``model_config`` is a digest of the architecture settings (rope scaling, overrides, quantisation).
    ``layout`` is the host layout of the bytes and its version. The shard is the part of the model that these bytes
    hold: part ``tp_rank`` of ``tp_size`` equal parts of the KV heads, and stage ``pp_rank`` of ``pp_size`` of the
    layers. ``lora`` and ``cache_salt`` isolate adapters and tenants. ``codec`` names the one that is not exact through
    which such KV may have gone, and what was computed from it; empty: none.
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
    codec: str = ""

    @cached_property
    def _root(self) -> bytes:
        # A msgpack map of named, length-prefixed fields: no two namespaces read alike. "surrogatepass" because a salt
        # comes from a client, whose JSON may hold half a surrogate pair.
        fields = {name: str(value).encode("utf-8", "surrogatepass") for name, value in asdict(self).items()}
        # Keys from before there was this field stay what they were.
        if not self.codec:
            del fields["codec"]
        return blake3(msgspec.msgpack.encode(fields, order="sorted")).digest()

    @property
    def shard(self) -> Shard:
        return Shard(self.tp_rank, self.tp_size, self.pp_rank, self.pp_size)

    @cached_property
    def id(self) -> bytes:
        """16 bytes that stand in front of every key of this namespace: its model's, with its shard woven in, so that
        who knows the shard also knows the id of any other.

        Raises:
            ValueError: there are more than 256 ranks of a kind.
        """
        return _xor(self._model_root[:NAMESPACE_BYTES], self.shard.code)

    @cached_property
    def _model_root(self) -> bytes:
        """The root of the model as one shard."""
        return replace(self, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)._root

    @cached_property
    def prefix_root(self) -> bytes:
        return blake3(b"prefix", key=self._model_root).digest()

    @cached_property
    def segment_root(self) -> bytes:
        return blake3(b"segment", key=self._model_root).digest()


def token_bytes(tokens: Tokens) -> bytes:
    """Token ids as little-endian uint32, one after the other: the bytes that are hashed.

    Raises:
        ValueError: a token is negative or does not fit 32 bits, or ``tokens`` is not a row of integers.
    """
    if isinstance(tokens, torch.Tensor):
        if tokens.dtype.is_floating_point or tokens.dtype.is_complex:
            raise ValueError(f"tokens must be a 1-D array of integers, got {tokens.dtype}")
        tokens = tokens.detach().cpu().numpy()
    if isinstance(tokens, np.ndarray):
        return token_array(tokens).tobytes()
    try:
        # Eight times as fast as numpy reads a list; a list alone as `*args` is unpacked without a copy in between,
        # which `struct.pack(format, *tokens)` would make.
        return struct.Struct(f"<{len(tokens)}I").pack(*tokens)
    except struct.error as error:
        raise ValueError(f"token ids must be integers in 0 … 2³²−1: {error}") from None


def token_array(tokens: Tokens) -> npt.NDArray[np.uint32]:
    """Token ids as an array that nobody changes, the same one where it is one already; errors as in
    :func:`token_bytes`."""
    if isinstance(tokens, np.ndarray):
        if tokens.dtype == _UINT32 and tokens.ndim == 1 and not tokens.flags.writeable:
            return tokens.astype(_UINT32, copy=False)
        return _checked_uint32(tokens)
    return np.frombuffer(token_bytes(tokens), dtype=_UINT32)


def _checked_uint32(array: npt.NDArray[np.integer]) -> npt.NDArray[np.uint32]:
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"tokens must be a 1-D array of integers, got {array.dtype} of shape {array.shape}")
    narrow = array.astype(_UINT32)
    if not np.array_equal(narrow, array):
        raise ValueError(f"token ids must be integers in 0 … 2³²−1, got {array.min()} … {array.max()}")
    narrow.flags.writeable = False
    return narrow


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

    Raises:
        ValueError: a token is not an integer in 0 … 2³²−1, or ``parent`` belongs to another namespace.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    if parent is not None and parent.namespace_id != namespace.id:
        raise ValueError(f"{parent!r} is not of the namespace {namespace.id.hex()[:8]}… of these tokens")
    data = token_bytes(tokens)
    step = chunk_size * 4
    end = len(data) if include_partial else len(data) - len(data) % step
    digest = namespace.prefix_root if parent is None else parent.digest
    space = namespace.id
    new_key = partial(bytes.__new__, PrefixKey)  # the length is right, so skip the check: this loop is the hot one
    keys = []
    for start in range(0, end, step):
        digest = blake3(data[start : start + step], key=digest).digest()
        keys.append(new_key(space + digest))
    return keys


def segment_key(namespace: Namespace, tokens: Tokens) -> SegmentKey:
    """Key of ``tokens`` as a passage of its own."""
    return SegmentKey(namespace.id + blake3(token_bytes(tokens), key=namespace.segment_root).digest())


def placed_segment_key(namespace: Namespace, tokens: Tokens, start: int) -> SegmentKey:
    """Key of a chunk of a prompt that was computed at positions ``start …``, whatever stood before it.

    The position belongs to the name: keys are stored rotated, and who finds the chunk again must know by how much.
    """
    place = start.to_bytes(8, "little")
    return SegmentKey(
        namespace.id + blake3(b"placed" + place + token_bytes(tokens), key=namespace.segment_root).digest()
    )
