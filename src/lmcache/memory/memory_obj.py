"""A counted reference to one chunk of KV in host memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

import torch


@dataclass(frozen=True)
class KVSpec:
    """What the bytes of one chunk are: enough to allocate them, to check a file and to read them back.

    ``layout`` is ``metadata.TOKEN_MAJOR`` (then ``shape`` is ``[layers, planes, tokens, heads, dim]``) or the tag of an
    engine's own page layout (then ``shape`` is ``[layers, pages, …]``). The bytes are always contiguous.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    num_tokens: int

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class MemoryObj:
    """``spec.nbytes`` bytes of a pool, counted.

    The creator holds the first reference. Whoever keeps the object calls :meth:`ref_up`; whoever is done calls
    :meth:`ref_down`; at zero the bytes go back to the pool and touching them raises. Usable as a context manager
    that gives back one reference.
    """

    __slots__ = ("_bytes", "_lock", "_release", "offset", "ref_count", "spec")

    def __init__(
        self,
        spec: KVSpec,
        buffer: torch.Tensor,
        offset: int,
        release: Callable[[MemoryObj], None],
        lock: threading.Lock | None = None,
    ) -> None:
        """Args:
        buffer: uint8, at least ``spec.nbytes`` long, 4096-byte aligned and padded to a multiple of 4096 bytes.
        offset: where the buffer lies in its pool, for the pool's own use.
        release: called once with this object when the last reference goes.
        lock: guards ``ref_count``; a pool shares one between its objects.
        """
        self.spec = spec
        self.offset = offset
        self.ref_count = 1
        self._bytes: torch.Tensor | None = buffer
        self._release = release
        self._lock = lock or threading.Lock()

    @property
    def bytes(self) -> torch.Tensor:
        """The payload, uint8 ``[spec.nbytes]``.

        Raises:
            RuntimeError: the object was already given back.
        """
        return self.padded_bytes[: self.spec.nbytes]

    @property
    def padded_bytes(self) -> torch.Tensor:
        """The whole allocation, uint8, a multiple of 4096 bytes long and aligned to 4096: what O_DIRECT needs."""
        if self._bytes is None:
            raise RuntimeError("MemoryObj used after its last reference was given back")
        return self._bytes

    @property
    def tensor(self) -> torch.Tensor:
        """The payload as ``spec.dtype`` in ``spec.shape``; a view, valid while a reference is held."""
        return self.bytes.view(self.spec.dtype).view(self.spec.shape)

    def ref_up(self) -> MemoryObj:
        with self._lock:
            if self.ref_count <= 0:
                raise RuntimeError("ref_up on a MemoryObj that was already given back")
            self.ref_count += 1
        return self

    def ref_down(self) -> None:
        with self._lock:
            if self.ref_count <= 0:
                raise RuntimeError("ref_down on a MemoryObj that was already given back")
            self.ref_count -= 1
            last = self.ref_count == 0
        if last:
            self._bytes = None
            self._release(self)

    def __enter__(self) -> MemoryObj:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ref_down()

    def __repr__(self) -> str:
        return f"MemoryObj({self.spec.shape}, {self.spec.dtype}, {self.spec.layout}, refs={self.ref_count})"
