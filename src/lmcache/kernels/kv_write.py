"""Writing K and V into rows that lie anywhere: moved ones with their keys turned on the way, and shifts to be added.

References: :meth:`lmcache.blend.rope.FusedRope.fused_encode` and ``index_copy_``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lmcache.kernels.fp8 import as_fp8
from lmcache.kernels.kv_rows import KVRows
from lmcache.kernels.launch import launch

_ROWS = 4


@dataclass(frozen=True)
class Turns:
    """How far rows turn. ``cos`` and ``sin`` (float32 ``[G, rotary_dim / 2]``, any factor on them included) have a row
    for each distance; ``of_row`` (int32 ``[n]``) says which one a row takes. Pairs as in
    :class:`lmcache.blend.rope.FusedRope`; the first ``rotary_dim`` elements of a head turn."""

    cos: torch.Tensor
    sin: torch.Tensor
    of_row: torch.Tensor
    is_neox_style: bool


@triton.jit(do_not_specialize=["DISTANCES", "num_rows", "staged_layer"])
def _place_kernel(
    STAGED,
    K_FROM,
    V_FROM,
    ROW,
    TURN,
    COS,
    SIN,
    OFFSETS,
    DISTANCES,
    K,
    V,
    num_rows,
    staged_row,
    staged_layer,
    k_head,
    v_head,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TURNS: tl.constexpr,
    NEOX: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS * BLOCK_H + tl.arange(0, ROWS * BLOCK_H)
    i = r // BLOCK_H
    h = r % BLOCK_H
    there = (i < num_rows) & (h < HEADS)
    row = tl.load(ROW + i, mask=there, other=0)
    to = tl.multiple_of(tl.load(OFFSETS + row, mask=there, other=0), ALIGN)
    if DISTANCES is not None:
        layer = tl.program_id(1)
        to += tl.multiple_of(tl.load(DISTANCES + layer), ALIGN)
        STAGED += layer.to(tl.int64) * staged_layer
    k_from = STAGED + tl.load(K_FROM + i, mask=there, other=0).to(tl.int64) * staged_row + h * DIM
    v_from = STAGED + tl.load(V_FROM + i, mask=there, other=0).to(tl.int64) * staged_row + h * DIM
    k_to = K + to + h * k_head
    v_to = V + to + h * v_head
    d = tl.arange(0, BLOCK_D)
    whole = there[:, None] & (d < DIM)[None, :]
    tl.store(v_to[:, None] + d[None, :], tl.load(v_from[:, None] + d[None, :], mask=whole), mask=whole)
    if TURNS:
        turn = tl.load(TURN + i, mask=there, other=0)
        p = tl.arange(0, BLOCK_HALF)
        pairs = there[:, None] & (p < HALF)[None, :]
        if NEOX:
            x_at = p
            y_at = p + HALF
        else:
            x_at = 2 * p
            y_at = 2 * p + 1
        cos = tl.load(COS + turn[:, None] * HALF + p[None, :], mask=pairs, other=1.0)
        sin = tl.load(SIN + turn[:, None] * HALF + p[None, :], mask=pairs, other=0.0)
        x = tl.load(k_from[:, None] + x_at[None, :], mask=pairs, other=0.0).to(tl.float32)
        y = tl.load(k_from[:, None] + y_at[None, :], mask=pairs, other=0.0).to(tl.float32)
        kind = K.dtype.element_ty
        if kind.is_fp8():
            # What turns real numbers turns stored ones just as well: they differ by a factor.
            tl.store(k_to[:, None] + x_at[None, :], as_fp8(x * cos - y * sin, kind), mask=pairs)
            tl.store(k_to[:, None] + y_at[None, :], as_fp8(y * cos + x * sin, kind), mask=pairs)
        else:
            tl.store(k_to[:, None] + x_at[None, :], (x * cos - y * sin).to(kind), mask=pairs)
            tl.store(k_to[:, None] + y_at[None, :], (y * cos + x * sin).to(kind), mask=pairs)
        if 2 * HALF < DIM:
            rest = whole & (d >= 2 * HALF)[None, :]
            tl.store(k_to[:, None] + d[None, :], tl.load(k_from[:, None] + d[None, :], mask=rest), mask=rest)
    else:
        tl.store(k_to[:, None] + d[None, :], tl.load(k_from[:, None] + d[None, :], mask=whole), mask=whole)


def place(
    staged: torch.Tensor,
    k_from: torch.Tensor,
    v_from: torch.Tensor,
    rows: torch.Tensor,
    kv: KVRows,
    turns: Turns | None,
    distances: torch.Tensor | None = None,
) -> None:
    """K and V of ``n`` tokens to ``rows`` of ``kv``, the keys turned on the way, with one rounding. fp8 is taken to
    have the same scales on both sides.

    Args:
        staged: ``[m, kv_heads · dim]``, dense, of the dtype of ``kv``; ``k_from`` and ``v_from`` (int32 ``[n]``) are
            the rows of it in which the tokens' K and V lie.
        rows: int32 ``[n]``.
        turns: None: the keys stay as they are.
        distances: of layers that are placed alike, see :class:`lmcache.kernels.kv_rows.KVLayers`; ``staged`` is
            ``[layers, m, kv_heads · dim]`` then.
    """
    num_rows = len(rows)
    if not num_rows:
        return
    half = turns.cos.shape[1] if turns is not None else 1
    block_h = triton.next_power_of_2(kv.num_heads)
    launch(
        _place_kernel,
        (triton.cdiv(num_rows, _ROWS), 1 if distances is None else len(distances)),
        staged,
        k_from,
        v_from,
        rows,
        rows if turns is None else turns.of_row,
        staged if turns is None else turns.cos,
        staged if turns is None else turns.sin,
        kv.offsets,
        distances,
        kv.keys,
        kv.values,
        num_rows,
        staged.stride(-2),
        0 if distances is None else staged.stride(0),
        kv.key_head_stride,
        kv.value_head_stride,
        HEADS=kv.num_heads,
        BLOCK_H=block_h,
        DIM=kv.dim,
        BLOCK_D=triton.next_power_of_2(kv.dim),
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        TURNS=turns is not None,
        NEOX=turns is None or turns.is_neox_style,
        ALIGN=kv.alignment,
        ROWS=_ROWS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _write_kernel(
    FROM_K,
    FROM_V,
    ROW,
    OFFSETS,
    K,
    V,
    K_SCALE,
    V_SCALE,
    num_rows,
    from_k_row,
    from_k_head,
    from_v_row,
    from_v_head,
    k_head,
    v_head,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS * BLOCK_H + tl.arange(0, ROWS * BLOCK_H)
    i = r // BLOCK_H
    h = r % BLOCK_H
    there = (i < num_rows) & (h < HEADS)
    row = tl.load(ROW + i, mask=there, other=-1)
    there &= row >= 0
    to = tl.multiple_of(tl.load(OFFSETS + row, mask=there, other=0), ALIGN)
    d = tl.arange(0, BLOCK_D)
    whole = there[:, None] & (d < DIM)[None, :]
    k_to = (K + to + h * k_head)[:, None] + d[None, :]
    v_to = (V + to + h * v_head)[:, None] + d[None, :]
    k = tl.load((FROM_K + i.to(tl.int64) * from_k_row + h * from_k_head)[:, None] + d[None, :], mask=whole, other=0.0)
    v = tl.load((FROM_V + i.to(tl.int64) * from_v_row + h * from_v_head)[:, None] + d[None, :], mask=whole, other=0.0)
    if K_SCALE is not None:
        # Divided as exactly as vLLM does it, so that rows that it would write too get the same numbers.
        k = tl.div_rn(k.to(tl.float32), tl.load(K_SCALE))
        v = tl.div_rn(v.to(tl.float32), tl.load(V_SCALE))
    if ADD:
        k = k.to(tl.float32) + tl.load(k_to, mask=whole, other=0.0).to(tl.float32)
        v = v.to(tl.float32) + tl.load(v_to, mask=whole, other=0.0).to(tl.float32)
    if K_SCALE is not None:
        k = as_fp8(k, K.dtype.element_ty)
        v = as_fp8(v, V.dtype.element_ty)
    tl.store(k_to, k.to(K.dtype.element_ty), mask=whole)
    tl.store(v_to, v.to(V.dtype.element_ty), mask=whole)


def write(keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, kv: KVRows, *, add: bool = False) -> None:
    """``keys`` and ``values`` ``[n, kv_heads, dim]`` (last dim dense) take the place of ``rows`` (int32 ``[n]``) of
    ``kv``, or are added to them in float32 and rounded once. Rows of −1 are left out. Real numbers, also where the
    rows are fp8: what is too large for these becomes their largest."""
    num_rows = len(rows)
    if not num_rows:
        return
    launch(
        _write_kernel,
        (triton.cdiv(num_rows, _ROWS),),
        keys,
        values,
        rows,
        kv.offsets,
        kv.keys,
        kv.values,
        kv.key_scale,
        kv.value_scale,
        num_rows,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        kv.key_head_stride,
        kv.value_head_stride,
        HEADS=kv.num_heads,
        BLOCK_H=triton.next_power_of_2(kv.num_heads),
        DIM=kv.dim,
        BLOCK_D=triton.next_power_of_2(kv.dim),
        ALIGN=kv.alignment,
        ADD=add,
        ROWS=_ROWS,
        num_warps=4,
    )
