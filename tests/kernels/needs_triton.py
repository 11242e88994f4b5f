"""Kernels run in Triton's interpreter where there is no GPU: set ``TRITON_INTERPRET=1`` before Triton is loaded."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require() -> None:
    """Skip the whole module where kernels cannot run."""
    pytest.importorskip("triton")
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)


DTYPES = [torch.float32, torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.float16]
"""The interpreter cannot multiply bfloat16."""

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
