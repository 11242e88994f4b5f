"""Whether kernels can run here."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch


def kernels_for(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be given to kernels: on a GPU with Triton, and anywhere in Triton's interpreter
    (``TRITON_INTERPRET=1``), which is for tests."""
    return _has_triton() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def fp8_kernels_for(device: torch.device) -> bool:
    """Whether kernels can have fp8 numbers there: Triton knows e4m3 of GPUs from compute capability 8.9 on."""
    return kernels_for(device) and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
