"""Rounding to fp8 is torch's, saturated."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.needs_triton import DEVICE, FP8, require

require()

import triton  # noqa: E402 - needs Triton
import triton.language as tl  # noqa: E402

from lmcache.kernels.fp8 import as_fp8  # noqa: E402
from tests.kernels.fp8_numbers import rounded  # noqa: E402


@triton.jit
def _round_kernel(X, OUT, BACK, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored = as_fp8(tl.load(X + i), OUT.dtype.element_ty)
    tl.store(OUT + i, stored)
    tl.store(BACK + i, stored.to(tl.float32))


@pytest.mark.parametrize("dtype", FP8)
def test_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()].sort().values
    ties = (every[1:] + every[:-1]) / 2
    beside = torch.cat([torch.nextafter(ties, torch.full_like(ties, far)) for far in (-torch.inf, torch.inf)])
    large = torch.tensor([1e3, 1e5, 1e30, torch.inf])
    noise = torch.randn(4096) * torch.logspace(-9, 5, 4096)
    numbers = torch.cat([every, ties, beside, large, -large, noise])
    numbers = numbers[: len(numbers) // 256 * 256].to(DEVICE)
    stored, back = torch.empty_like(numbers, dtype=dtype), torch.empty_like(numbers)
    _round_kernel[(len(numbers) // 256,)](numbers, stored, back, BLOCK=256)
    assert torch.equal(stored.float(), rounded(numbers, dtype).float())
    assert torch.equal(back, stored.float())
