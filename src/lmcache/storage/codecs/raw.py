"""As they are."""

from __future__ import annotations

from typing import ClassVar

import torch

from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.codecs.interface import Codec, CodecError


class RawCodec(Codec):
    name: ClassVar[str] = "raw"
    is_exact: ClassVar[bool] = True

    def encode(self, tensor: torch.Tensor, spec: KVSpec) -> bytes | None:
        """None: there is nothing to pack."""
        return None

    def max_bytes(self, spec: KVSpec) -> int:
        return spec.nbytes

    def decode(self, packed: memoryview, tensor: torch.Tensor, spec: KVSpec) -> None:
        raise CodecError("raw chunks are not packed")
