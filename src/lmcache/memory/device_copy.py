"""Many copies from pinned host memory to a GPU, queued with as little work on the host as there can be.

One call for all (``cudaMemcpyBatchAsync``, CUDA 12.8): on the host of an H100, 128 copies of half a megabyte take
0.11 ms to queue, against 0.45 ms one by one, and run at 54 GB/s, against 41.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lmcache.memory.slab import forget_cuda_error

logger = logging.getLogger(__name__)

Addresses: TypeAlias = npt.NDArray[np.uint64]
"""Bytes, or where they lie; dense."""

_HOST_TO_DEVICE = 1
_IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream
_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91
_BATCHES_SINCE, _NO_FAILED_INDEX_SINCE = 12080, 13000


class _Location(ctypes.Structure):
    """``cudaMemLocation``"""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """``cudaMemcpyAttributes``"""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("destination_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class _Runtime:
    """CUDA's runtime, which torch has loaded."""

    def __init__(self, library: Any) -> None:
        self._copy = library.cudaMemcpyAsync
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._attribute = library.cudaDeviceGetAttribute
        version = ctypes.c_int()
        library.cudaRuntimeGetVersion(ctypes.byref(version))
        self._batch: Callable[..., int] | None = None
        if version.value >= _BATCHES_SINCE:
            self._batch = getattr(library, "cudaMemcpyBatchAsync", None)
        self._tells_failed_index = version.value < _NO_FAILED_INDEX_SINCE
        self._attributes = (_Attributes * 1)(_Attributes(_IN_STREAM_ORDER))
        self._attribute_index = (ctypes.c_size_t * 1)(0)

    def has(self, attribute: int, device: int) -> bool:
        """Whether a device says yes to ``attribute``."""
        value = ctypes.c_int()
        error = self._attribute(ctypes.byref(value), attribute, device)
        if error:
            forget_cuda_error()
        return not error and value.value != 0

    def copy(self, to: Addresses, source: Addresses, sizes: Addresses, stream: int) -> None:
        if self._batch is not None:
            failed = [ctypes.byref(ctypes.c_size_t())] if self._tells_failed_index else []
            error = self._batch(
                *(ctypes.c_void_p(array.ctypes.data) for array in (to, source, sizes)),
                ctypes.c_size_t(len(to)),
                self._attributes,
                self._attribute_index,
                ctypes.c_size_t(1),
                *failed,
                ctypes.c_void_p(stream),
            )
            if not error:
                return
            forget_cuda_error()
            self._batch = None
            logger.info("copies to the GPU are queued one by one: cudaMemcpyBatchAsync gave CUDA error %d", error)
        for target, origin, size in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
            error = self._copy(target, origin, size, _HOST_TO_DEVICE, stream)
            if error:
                forget_cuda_error()
                raise RuntimeError(f"cudaMemcpyAsync: CUDA error {error}")


@cache
def _runtime() -> _Runtime | None:
    """None where it cannot be reached."""
    try:
        return _Runtime(ctypes.CDLL(None))
    except (OSError, AttributeError):
        return None


def can_copy_many(device: torch.device) -> bool:
    return device.type == "cuda" and _runtime() is not None


@cache
def kernels_reach_pinned(device: torch.device) -> bool:
    """Whether kernels on a CUDA device can write to pinned host memory, by the address that it has on the host."""
    runtime = _runtime()
    index = torch.cuda.current_device() if device.index is None else device.index
    return runtime is not None and runtime.has(_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, index)


def copy_many(to: Addresses, source: Addresses, sizes: Addresses, stream: torch.cuda.Stream) -> None:
    """Queue the copies of ``sizes[i]`` bytes at ``source[i]`` to ``to[i]`` on the device, in any order.

    The host memory must stay as it is until the stream has come past; memory that is not pinned may be copied at once.
    ``stream`` is not the default one.

    Raises:
        RuntimeError: CUDA refuses.
    """
    runtime = _runtime()
    assert runtime is not None
    runtime.copy(to, source, sizes, stream.cuda_stream)
