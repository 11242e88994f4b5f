"""Small tensors on their way to an accelerator."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on ``device``, for what is queued on the current stream from now on.

    The host does not wait: of ordinary memory, CUDA copies more than 64 KiB only when all that was queued before is
    done.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
