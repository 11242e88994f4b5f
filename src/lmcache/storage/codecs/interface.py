"""What every codec does. One conformance suite runs over all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from lmcache.memory.memory_obj import KVSpec


class CodecError(Exception):
    """Bytes that this codec has not written for this spec."""


class Codec(ABC):
    """Stateless and thread-safe. Tensors are a chunk's payload: contiguous, ``spec.shape`` of ``spec.dtype``."""

    name: ClassVar[str]
    is_exact: ClassVar[bool]
    """Whether the same bytes come back."""

    def takes(self, spec: KVSpec) -> bool:
        """Whether chunks of ``spec`` can be packed; others stay raw."""
        return True

    @abstractmethod
    def encode(self, tensor: torch.Tensor, spec: KVSpec) -> bytes | None:
        """The packed bytes; None where these values cannot be packed, or it would not help."""

    @abstractmethod
    def max_bytes(self, spec: KVSpec) -> int:
        """Longer than this is nothing that :meth:`encode` gives."""

    @abstractmethod
    def decode(self, packed: memoryview, tensor: torch.Tensor, spec: KVSpec) -> None:
        """Fill ``tensor``.

        Raises:
            CodecError: ``packed`` was not made for ``spec``.
        """
