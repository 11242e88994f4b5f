"""Rotation written the plain way, pair by pair in float64, and how far one rounding may be from it."""

from __future__ import annotations

import torch


def pairs_of(rotary_dim: int, is_neox_style: bool) -> list[tuple[int, int]]:
    half = rotary_dim // 2
    return [(i, i + half) if is_neox_style else (2 * i, 2 * i + 1) for i in range(half)]


def rotated(
    k: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    is_neox_style: bool = True,
    offset: int = 0,
    scaling: float = 1.0,
) -> torch.Tensor:
    """``k`` ``[T, H, D]`` turned by ``positions`` ``[T]``, of any sign; elements from ``offset`` on turn."""
    out = k.to(torch.float64).clone()
    source = out.clone()
    for i, (x, y) in enumerate(pairs_of(2 * len(inv_freq), is_neox_style)):
        angle = positions.to(torch.float64) * float(inv_freq[i])
        cos, sin = scaling * angle.cos()[:, None], scaling * angle.sin()[:, None]
        a, b = source[..., offset + x], source[..., offset + y]
        out[..., offset + x] = a * cos - b * sin
        out[..., offset + y] = a * sin + b * cos
    return out


def error_bound(
    exact: torch.Tensor, rotary_dim: int, offset: int, is_neox_style: bool, dtype: torch.dtype
) -> torch.Tensor:
    """What a rotation of ``exact`` in float32 and one rounding to ``dtype`` may be off by, element by element.

    cos, sin, each product and the sum round once (u = 2⁻²⁴): 2u(|a cos| + |b sin|) + u|sum| ≤ 3u·|(a, b)|. A narrower
    type adds its own rounding.
    """
    length = torch.zeros_like(exact)
    for x, y in pairs_of(rotary_dim, is_neox_style):
        pair = torch.hypot(exact[..., offset + x], exact[..., offset + y])
        length[..., offset + x] = length[..., offset + y] = pair
    bound = 3.01 * 2.0**-24 * length
    if dtype != torch.float32:
        info = torch.finfo(dtype)
        bound += 1.001 * info.eps / 2 * exact.abs() + info.tiny * info.eps / 2
    return bound
