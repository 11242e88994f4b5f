"""Small tensors on their way to an accelerator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

# What a driver sends along with its commands. Anything larger, and all that is pinned but a few kilobytes, stands in
# line behind whatever copies are under way, on any stream: 10 ms behind half a gigabyte of KV, 0.1 ms otherwise
# (measured on an H100; the limit there lies between 60,000 bytes and 128 KiB).
_INLINE_BYTES = 48 * 1024
_MOST_PIECES = 16
# Kernels are compiled apart for tensors that do not begin at a multiple of it.
_ALIGNMENT_BYTES = 16


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A dense CPU tensor on ``device``, for what is queued on the current stream from now on.

    The host does not wait, and the tensor does not wait for KV that is on its way.
    """
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.nbytes <= _INLINE_BYTES:
        return tensor.to(device, non_blocking=True)
    if tensor.nbytes > _MOST_PIECES * _INLINE_BYTES:
        return tensor.pin_memory().to(device, non_blocking=True)
    sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    step = _INLINE_BYTES // tensor.element_size()
    there, here = sent.flatten(), tensor.flatten()
    for start in range(0, len(here), step):
        there[start : start + step].copy_(here[start : start + step], non_blocking=True)
    return sent


def ints_to_device(vectors: Sequence[npt.NDArray[np.integer]], device: torch.device) -> list[torch.Tensor]:
    """Each of ``vectors`` as int32, as :func:`to_device` sends a tensor, but all in one."""
    step = _ALIGNMENT_BYTES // 4
    starts = np.cumsum([0, *(-(-len(vector) // step) * step for vector in vectors)]).tolist()
    together = np.zeros(starts[-1], dtype=np.int32)
    for start, vector in zip(starts, vectors, strict=False):
        together[start : start + len(vector)] = vector
    sent = to_device(torch.from_numpy(together), device)
    return [sent[start : start + len(vector)] for start, vector in zip(starts, vectors, strict=False)]
