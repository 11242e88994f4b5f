"""Copies from pinned host memory to a GPU, queued with as little work on the host as there can be."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

_HOST_TO_DEVICE = 1


@cache
def _runtime() -> Any | None:
    """CUDA's runtime, which torch has loaded; None where it cannot be reached."""
    try:
        copy = ctypes.CDLL(None).cudaMemcpy2DAsync
    except (OSError, AttributeError):
        return None
    size = ctypes.c_size_t
    copy.argtypes = [ctypes.c_void_p, size, ctypes.c_void_p, size, size, size, ctypes.c_int, ctypes.c_void_p]
    copy.restype = ctypes.c_int
    return copy


def can_copy_rows(device: torch.device) -> bool:
    return device.type == "cuda" and _runtime() is not None


def copy_rows(
    to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: torch.cuda.Stream
) -> None:
    """Queue the copy of ``height`` runs of ``width`` bytes, ``pitch`` bytes from one to the next, to the device.

    torch copies on the host first where memory is not dense; this does not, and is quicker to call. The host memory
    must stay as it is until the stream has come past; memory that is not pinned is copied at once.

    Raises:
        RuntimeError: CUDA refuses.
    """
    runtime = _runtime()
    assert runtime is not None
    error = runtime(to, to_pitch, source, source_pitch, width, height, _HOST_TO_DEVICE, stream.cuda_stream)
    if error:
        raise RuntimeError(f"cudaMemcpy2DAsync: CUDA error {error}")
