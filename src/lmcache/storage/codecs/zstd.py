"""Zstandard over bytes of like meaning: the signs and exponents of all numbers first, then what follows them.

KV has nearly random mantissas and much alike exponents; together, the latter shrink well (byte shuffling, as in Blosc).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import zstandard

from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.codecs.interface import Codec, CodecError

_LEVEL = 1
# Less gained than this is not worth the time to unpack.
_WORTH = 0.97


class ZstdCodec(Codec):
    name: ClassVar[str] = "zstd"
    is_exact: ClassVar[bool] = True

    def encode(self, tensor: torch.Tensor, spec: KVSpec) -> bytes | None:
        planes = tensor.view(torch.uint8).view(-1, spec.dtype.itemsize).t().contiguous()
        packed = zstandard.ZstdCompressor(level=_LEVEL).compress(planes.numpy().data)
        return packed if len(packed) < _WORTH * spec.nbytes else None

    def max_bytes(self, spec: KVSpec) -> int:
        return spec.nbytes

    def decode(self, packed: memoryview, tensor: torch.Tensor, spec: KVSpec) -> None:
        data = unpacked(packed, spec.nbytes)
        planes = torch.frombuffer(data, dtype=torch.uint8).view(spec.dtype.itemsize, -1)
        tensor.view(torch.uint8).view(-1, spec.dtype.itemsize).copy_(planes.t())


def unpacked(packed: memoryview, nbytes: int) -> bytearray:
    """What was packed, if that is exactly ``nbytes`` long: no more memory than this is taken.

    Raises:
        CodecError: it is not, or is damaged.
    """
    try:
        if zstandard.frame_content_size(packed) != nbytes:
            raise CodecError("the packed length is not that of the chunk")
        data = bytearray(nbytes)
        with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
            done = 0
            while done < nbytes and (count := reader.readinto(memoryview(data)[done:])):
                done += count
        if done != nbytes:
            raise CodecError("the packed bytes end too soon")
    except zstandard.ZstdError as error:
        raise CodecError(str(error)) from error
    return data
