"""Matrix products that on a CPU go through the faster of the two libraries that torch brings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _onednn_dtypes() -> frozenset[torch.dtype]:
    """What oneDNN multiplies on this machine. It refuses what the processor has no instructions for: without AVX-512,
    say, both of the halves."""
    if _ONEDNN is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return frozenset()
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    halves = (dtype for dtype, name in asked.items() if getattr(torch.ops.mkldnn, name, bool)())
    return frozenset((torch.float32, *halves))


_ONEDNN_DTYPES = _onednn_dtypes()


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weightᵀ`` for ``[n, d]`` and ``[m, d]`` of one dtype and device.

    torch itself calls oneDNN for float32 only in compiled code; on processors of another make than MKL's it is twice
    as fast as MKL, on others equal. Halves that it refuses torch multiplies seven times slower than float32.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight)
    if x.dtype in (torch.bfloat16, torch.float16) and x.dtype not in _ONEDNN_DTYPES:
        return linear(x.float(), weight.float()).to(x.dtype)
    if x.dtype not in _ONEDNN_DTYPES:
        return F.linear(x, weight)
    # It crawls over what is not contiguous.
    product: torch.Tensor = _ONEDNN(x.contiguous(), weight.contiguous(), None, "none", [], "")
    return product
