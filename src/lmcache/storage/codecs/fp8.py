"""8-bit floating point (e4m3, https://arxiv.org/abs/2209.05433), with a scale for every 128 numbers that lie together.

Error of a number x in a group whose largest magnitude is m: at most ``max(|x| · 2⁻⁴, m · 2⁻¹⁷)``, where m is not near
the smallest numbers of its dtype.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.codecs.interface import Codec, CodecError

_GROUP = 128
_LARGEST = 448.0
_TAKEN = (torch.bfloat16, torch.float16, torch.float32)


class Fp8Codec(Codec):
    """Packed: float32 scales of all groups, then one byte a number, the last group filled up with zeros."""

    name: ClassVar[str] = "fp8"
    is_exact: ClassVar[bool] = False

    def takes(self, spec: KVSpec) -> bool:
        return spec.dtype in _TAKEN and spec.nbytes > 0

    def encode(self, tensor: torch.Tensor, spec: KVSpec) -> bytes | None:
        numbers = tensor.reshape(-1)
        groups = _groups(spec)
        padded = torch.zeros(groups * _GROUP, dtype=torch.float32)
        padded[: len(numbers)] = numbers
        rows = padded.view(groups, _GROUP)
        largest = rows.abs().amax(1)
        if not largest.isfinite().all():
            return None
        scales = (largest / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        packed = (rows / scales[:, None]).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return scales.numpy().tobytes() + packed.view(torch.uint8).numpy().tobytes()

    def max_bytes(self, spec: KVSpec) -> int:
        return _groups(spec) * (4 + _GROUP)

    def decode(self, packed: memoryview, tensor: torch.Tensor, spec: KVSpec) -> None:
        groups = _groups(spec)
        if packed.nbytes != self.max_bytes(spec):
            raise CodecError(f"{packed.nbytes} bytes, expected {self.max_bytes(spec)}")
        data = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        scales = data[: 4 * groups].view(torch.float32)
        rows = data[4 * groups :].view(torch.float8_e4m3fn).view(groups, _GROUP).to(torch.float32)
        numbers = tensor.view(-1)
        numbers.copy_((rows * scales[:, None]).view(-1)[: len(numbers)])


def _groups(spec: KVSpec) -> int:
    return -(-spec.nbytes // spec.dtype.itemsize // _GROUP)
