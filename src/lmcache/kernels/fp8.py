"""Numbers as fp8 pages hold them: float8_e4m3fn or float8_e5m2, the real ones divided by a scale.

Reference: ``torch.clamp`` and ``torch.Tensor.to``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def real(x, SCALE):
    """What ``x`` stands for: float32 where it has a scale, else ``x`` itself."""
    if SCALE is not None:
        x = x.to(tl.float32) * tl.load(SCALE)
    return x


@triton.jit
def as_fp8(x, kind: tl.constexpr):
    """float32 ``x``, rounded to the nearest number of ``kind``, ties to even. What is too large becomes the largest
    one, as engines write their pages; NaN stays NaN. Zeros lose their sign.

    It is rounded in float32, so that nothing is left to how a version of Triton, or its interpreter, rounds to fp8.
    """
    E5M2: tl.constexpr = kind == tl.float8e5
    LARGEST: tl.constexpr = 57344.0 if E5M2 else 448.0
    MANTISSA: tl.constexpr = 2 if E5M2 else 3
    SMALLEST_NORMAL: tl.constexpr = -14 if E5M2 else -6
    x = tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 + SMALLEST_NORMAL)
    # A number so large that the steps of float32 beside it are those of ``kind`` beside x.
    far = (((exponent + (23 - MANTISSA)) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return ((x + far) - far).to(kind)
