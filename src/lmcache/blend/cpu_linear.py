"""Matrix products that on a CPU go through the faster of the two libraries that torch brings."""

from __future__ import annotations

import platform
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


def _mkl_is_at_home() -> bool:
    """Whether this is a processor of MKL's own make: on others it does not take its fastest ways."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        with open("/proc/cpuinfo") as described:
            return "GenuineIntel" in described.read(256)
    except OSError:
        return "GenuineIntel" in platform.processor()


_ONEDNN_DTYPES = _onednn_dtypes()
_MKL_FOR_FLOAT32 = _mkl_is_at_home()


def as_weights(weights: torch.Tensor) -> torch.Tensor:
    """``[…, m, d]`` on a CPU, as :func:`linear` reads pieces of it fastest: oneDNN crawls over what is not contiguous,
    MKL only asks that one of the last two dims be dense."""
    return weights if _goes_to_mkl(weights) else weights.contiguous()


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weightᵀ`` for ``[n, d]`` and ``[m, d]`` of one dtype and device.

    torch itself calls oneDNN for float32 only in compiled code. On processors of another make than MKL's it is twice
    as fast as MKL; on MKL's own, MKL is faster by a quarter where ``d`` or ``m`` is 64. Halves that oneDNN refuses
    torch multiplies seven times slower than float32.

    Args:
        out: ``[n, m]``, contiguous: room in which the product may be left, for memory that is new is slow. The product
            is what is returned.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight)
    if _goes_to_mkl(x):
        return torch.mm(x, weight.T, out=out)
    if x.dtype in (torch.bfloat16, torch.float16) and x.dtype not in _ONEDNN_DTYPES:
        return linear(x.float(), weight.float()).to(x.dtype)
    if x.dtype not in _ONEDNN_DTYPES:
        return F.linear(x, weight)
    product: torch.Tensor = _ONEDNN(x.contiguous(), weight.contiguous(), None, "none", [], "")
    return product


def _goes_to_mkl(x: torch.Tensor) -> bool:
    return _MKL_FOR_FLOAT32 and x.dtype == torch.float32
