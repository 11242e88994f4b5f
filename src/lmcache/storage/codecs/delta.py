"""Differences between tokens, in few steps, entropy-coded: after CacheGen (Liu et al., SIGCOMM 2024).

Tokens that stand close have alike keys and values. Every number is rounded to steps of its channel's scale (a channel
is one number of one head, its scale the largest magnitude among the chunk's tokens). The first token of each group of
16 is kept, the others as differences to it; both go through Zstandard. Deeper layers stand coarser steps: those of the
first third have 8 bits, of the second 6, of the last 5.

Error of a number in a channel whose largest magnitude is m: at most ``m / (2 · steps)``, and the rounding of its dtype,
with steps 127, 31 and 15, where m is not near the smallest numbers of its dtype.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import zstandard

from lmcache.memory.memory_obj import KVSpec
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.codecs.interface import Codec, CodecError
from lmcache.storage.codecs.zstd import unpacked

_GROUP = 16
_STEPS = (127, 31, 15)
_LEVEL = 1
_TAKEN = (torch.bfloat16, torch.float16, torch.float32)


class DeltaCodec(Codec):
    """Packed: float32 scales ``[layers, planes, heads · dim]``, then a Zstandard frame of int8
    ``[layers, planes, tokens, heads · dim]``. Only for chunks of the layout ``token-major``."""

    name: ClassVar[str] = "delta"
    is_exact: ClassVar[bool] = False

    def takes(self, spec: KVSpec) -> bool:
        return spec.layout == TOKEN_MAJOR and len(spec.shape) == 5 and spec.dtype in _TAKEN and spec.nbytes > 0

    def encode(self, tensor: torch.Tensor, spec: KVSpec) -> bytes | None:
        layers, planes, tokens, heads, dim = spec.shape
        numbers = tensor.view(layers, planes, tokens, heads * dim).to(torch.float32)
        largest = numbers.abs().amax(2)
        # Rounded up, the largest numbers of float32 would be infinite.
        if not (2 * largest).isfinite().all():
            return None
        scales = (largest / _steps(layers)[:, None, None]).clamp_min(torch.finfo(torch.float32).tiny)
        steps = (numbers / scales[:, :, None]).round_().clamp_(-127, 127).to(torch.int8)
        # Differences wrap around: they are undone modulo 256.
        steps -= _anchors(steps)
        packed = zstandard.ZstdCompressor(level=_LEVEL).compress(steps.numpy().data)
        if len(packed) + 4 * scales.numel() >= self.max_bytes(spec):
            return None
        return scales.numpy().tobytes() + packed

    def max_bytes(self, spec: KVSpec) -> int:
        return spec.nbytes

    def decode(self, packed: memoryview, tensor: torch.Tensor, spec: KVSpec) -> None:
        layers, planes, tokens, heads, dim = spec.shape
        in_scales = 4 * layers * planes * heads * dim
        if packed.nbytes <= in_scales:
            raise CodecError(f"{packed.nbytes} bytes, of which {in_scales} are scales")
        scales = torch.frombuffer(bytearray(packed[:in_scales]), dtype=torch.float32)
        data = unpacked(packed[in_scales:], layers * planes * tokens * heads * dim)
        steps = torch.frombuffer(data, dtype=torch.int8).view(layers, planes, tokens, heads * dim)
        steps += _anchors(steps)
        numbers = steps.to(torch.float32) * scales.view(layers, planes, 1, heads * dim)
        tensor.view(layers, planes, tokens, heads * dim).copy_(numbers)


def _steps(layers: int) -> torch.Tensor:
    """Of each layer, float32 ``[layers]``."""
    return torch.tensor([_STEPS[3 * layer // layers] for layer in range(layers)], dtype=torch.float32)


def _anchors(steps: torch.Tensor) -> torch.Tensor:
    """For each token that of its group's first one, zero for those themselves. ``[layers, planes, tokens, n]``."""
    tokens = steps.shape[2]
    first = torch.arange(tokens) // _GROUP * _GROUP
    anchors = steps[:, :, first]
    anchors[:, :, ::_GROUP] = 0
    return anchors
