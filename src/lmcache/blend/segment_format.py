"""How the KV of a passage lies in one block of bytes: a header that says what it is, then K and V layer by layer.

Self-describing, because a passage's keys are worth nothing without the position at which they were rotated, and because
layers may differ in shape. Nothing of it is trusted when it comes back: sizes are checked against the bytes there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import msgspec
import torch
from blake3 import blake3

from lmcache.blend.kv_source import KVLoadError
from lmcache.keys import DIGEST_BYTES, Tokens, token_bytes
from lmcache.memory.memory_obj import KVSpec

SEGMENT_LAYOUT = "segment-1"
"""Host layout: magic, header length, header, padding to 4096 bytes; then, layer by layer, K and V of every token."""

_MAGIC = b"lmcseg01"
_ALIGNMENT = 4096
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}

# [kv_heads, dim] of K and of V.
LayerShape = tuple[int, int, int, int]


class SegmentHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``start``: position of the first token when its key was rotated. ``before``: :func:`context_digest` of what stood
    before it. ``length``: tokens of the whole prompt then (frequencies of some scaled RoPE depend on it)."""

    num_tokens: int
    start: int
    length: int
    before: bytes
    dtype: str
    layers: tuple[LayerShape, ...]


def context_digest(tokens: Tokens) -> bytes:
    """32 bytes that name the tokens that stood before a passage."""
    return blake3(token_bytes(tokens)).digest(DIGEST_BYTES)


class SegmentFormat:
    """Where each layer of a passage lies in its bytes."""

    def __init__(self, header: SegmentHeader) -> None:
        self.header = header
        self._prefix = msgspec.msgpack.encode(header)
        self._dtype = _DTYPES[header.dtype]
        first = -(-(len(_MAGIC) + 4 + len(self._prefix)) // _ALIGNMENT) * _ALIGNMENT
        sizes = [header.num_tokens * n * self._dtype.itemsize for shape in header.layers for n in _elements(shape)]
        self._offsets = list(accumulate(sizes, initial=first))

    @property
    def spec(self) -> KVSpec:
        return KVSpec((self._offsets[-1],), torch.uint8, SEGMENT_LAYOUT, self.header.num_tokens)

    @classmethod
    def of(
        cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], *, start: int, length: int, before: bytes
    ) -> SegmentFormat:
        """The format of KV that is to be stored: K and V ``[T, kv_heads, dim]``, one a layer.

        Raises:
            ValueError: layers differ in number, length or dtype, or there is nothing to store.
        """
        if not keys or len(keys) != len(values):
            raise ValueError(f"expected K and V of every layer, got {len(keys)} and {len(values)} layers")
        num_tokens, dtype = len(keys[0]), keys[0].dtype
        name = str(dtype).removeprefix("torch.")
        if num_tokens < 1 or name not in _DTYPES:
            raise ValueError(f"{num_tokens} tokens of {name}: expected at least one, of {', '.join(_DTYPES)}")
        shapes = []
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            if k.dim() != 3 or v.dim() != 3 or {len(k), len(v)} != {num_tokens} or {k.dtype, v.dtype} != {dtype}:
                raise ValueError(
                    f"layer {layer}: K is {k.dtype} {list(k.shape)} and V is {v.dtype} {list(v.shape)}; expected "
                    f"[{num_tokens}, kv_heads, dim] of {dtype}, as layer 0"
                )
            shapes.append((k.shape[1], k.shape[2], v.shape[1], v.shape[2]))
        return cls(SegmentHeader(num_tokens, start, length, before, name, tuple(shapes)))

    @classmethod
    def read(cls, data: torch.Tensor) -> SegmentFormat:
        """The format of stored bytes (uint8 ``[n]``).

        Raises:
            KVLoadError: they are not a passage's, or not of this version.
        """
        lead = len(_MAGIC) + 4
        raw = data[:lead].numpy().tobytes()
        if raw[: len(_MAGIC)] != _MAGIC:
            raise KVLoadError("the stored bytes are no passage of this version")
        size = int.from_bytes(raw[len(_MAGIC) :], "little")
        if lead + size > len(data):
            raise KVLoadError(f"a header of {size} bytes does not fit {len(data)} stored bytes")
        try:
            header = msgspec.msgpack.decode(data[lead : lead + size].numpy().tobytes(), type=SegmentHeader)
        except ValueError as error:  # msgspec's errors are
            raise KVLoadError(f"the header of a stored passage does not read: {error}") from error
        counts = (header.num_tokens, *(n for shape in header.layers for n in shape))
        if header.dtype not in _DTYPES or min(counts) < 1 or max(counts) >= 2**31 or header.start < 0:
            raise KVLoadError(f"the header of a stored passage makes no sense: {header}")
        found = cls(header)
        if found.spec.nbytes != len(data):
            raise KVLoadError(f"a passage of {found.spec.nbytes} bytes by its header has {len(data)}")
        return found

    def write(self, data: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Fill ``data`` (uint8, ``spec.nbytes`` long)."""
        lead = _MAGIC + len(self._prefix).to_bytes(4, "little") + self._prefix
        data[: self._offsets[0]] = 0
        data[: len(lead)] = torch.frombuffer(bytearray(lead), dtype=torch.uint8)
        for layer, fresh in enumerate(zip(keys, values, strict=True)):
            for ours, theirs in zip(self.layer(data, layer), fresh, strict=True):
                ours.copy_(theirs)

    def layer(self, data: torch.Tensor, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views: K ``[T, kv_heads, dim]`` and V of one layer."""
        kv_heads, dim, value_heads, value_dim = self.header.layers[layer_id]
        at = self._offsets[2 * layer_id : 2 * layer_id + 3]
        k = data[at[0] : at[1]].view(self._dtype).view(self.header.num_tokens, kv_heads, dim)
        v = data[at[1] : at[2]].view(self._dtype).view(self.header.num_tokens, value_heads, value_dim)
        return k, v


def _elements(shape: LayerShape) -> tuple[int, int]:
    return math.prod(shape[:2]), math.prod(shape[2:])
