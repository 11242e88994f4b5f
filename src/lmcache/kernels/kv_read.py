"""Reading K and V from rows that lie anywhere: as dense tensors, or as how far fresh ones are from them.

References: ``index_select``, ``index_copy_``, and the sums of :meth:`lmcache.blend.layer_kv.LayerKV.measure`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmcache.kernels.fp8 import real
from lmcache.kernels.kv_rows import KVRows
from lmcache.kernels.launch import launch

_ROWS = 4


@triton.jit(do_not_specialize=["num_rows"])
def _read_kernel(
    ROW,
    OFFSETS,
    K,
    V,
    K_SCALE,
    V_SCALE,
    FRESH,
    FRESH_K,
    FRESH_V,
    OUT_K,
    OUT_V,
    num_rows,
    k_head,
    v_head,
    fresh_k_row,
    fresh_k_head,
    fresh_v_row,
    fresh_v_head,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS * BLOCK_H + tl.arange(0, ROWS * BLOCK_H)
    i = r // BLOCK_H
    h = r % BLOCK_H
    there = (i < num_rows) & (h < HEADS)
    row = tl.load(ROW + i, mask=there, other=-1)
    held = there & (row >= 0)
    at = tl.multiple_of(tl.load(OFFSETS + row, mask=held, other=0), ALIGN)
    d = tl.arange(0, BLOCK_D)
    written = there[:, None] & (d < DIM)[None, :]
    if FRESH is not None:
        fresh = tl.load(FRESH + i, mask=there, other=-1)
        held &= fresh < 0
    read = held[:, None] & (d < DIM)[None, :]
    k = real(tl.load((K + at + h * k_head)[:, None] + d[None, :], mask=read, other=0.0), K_SCALE)
    v = real(tl.load((V + at + h * v_head)[:, None] + d[None, :], mask=read, other=0.0), V_SCALE)
    kind = OUT_K.dtype.element_ty
    k = k.to(kind)
    v = v.to(kind)
    if FRESH is not None:
        is_fresh = (fresh >= 0)[:, None]
        from_k = (fresh.to(tl.int64) * fresh_k_row + h * fresh_k_head)[:, None] + d[None, :]
        from_v = (fresh.to(tl.int64) * fresh_v_row + h * fresh_v_head)[:, None] + d[None, :]
        k = tl.where(is_fresh, tl.load(FRESH_K + from_k, mask=is_fresh & written, other=0.0), k)
        v = tl.where(is_fresh, tl.load(FRESH_V + from_v, mask=is_fresh & written, other=0.0), v)
    to = (i.to(tl.int64) * HEADS * DIM + h * DIM)[:, None] + d[None, :]
    tl.store(OUT_K + to, k, mask=written)
    tl.store(OUT_V + to, v, mask=written)


def read(kv: KVRows, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of ``rows`` (int32 ``[n]``), each ``[n, kv_heads, dim]`` and dense; zero where a row is −1.

    In the dtype of ``kv``, or float32 where that is fp8.
    """
    return _read(kv, rows, kv.keys.dtype if kv.key_scale is None else torch.float32, None)


def read_among(
    kv: KVRows, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`read` of ``rows``, but where ``at`` (int32 ``[n]``) is not −1 it is row ``at`` of ``keys`` and ``values``
    ``[m, kv_heads, dim]``, in whose dtype all are given."""
    return _read(kv, rows, keys.dtype, (at, keys, values))


def _read(
    kv: KVRows, rows: torch.Tensor, dtype: torch.dtype, fresh: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.empty((len(rows), kv.num_heads, kv.dim), dtype=dtype, device=kv.keys.device)
    values = torch.empty_like(keys)
    at, fresh_keys, fresh_values = (None, keys, values) if fresh is None else fresh
    if len(rows):
        launch(
            _read_kernel,
            (triton.cdiv(len(rows), _ROWS),),
            rows,
            kv.offsets,
            kv.keys,
            kv.values,
            kv.key_scale,
            kv.value_scale,
            at,
            fresh_keys,
            fresh_values,
            keys,
            values,
            len(rows),
            kv.key_head_stride,
            kv.value_head_stride,
            *fresh_keys.stride()[:2],
            *fresh_values.stride()[:2],
            HEADS=kv.num_heads,
            BLOCK_H=triton.next_power_of_2(kv.num_heads),
            DIM=kv.dim,
            BLOCK_D=triton.next_power_of_2(kv.dim),
            ALIGN=kv.alignment,
            ROWS=_ROWS,
            num_warps=4,
        )
    return keys, values


@triton.jit(do_not_specialize=["num_rows"])
def _deviation_kernel(
    FROM_K,
    FROM_V,
    ROW,
    OFFSETS,
    K,
    V,
    K_SCALE,
    V_SCALE,
    OUT,
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
):
    i = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    whole = (h < HEADS)[:, None] & (d < DIM)[None, :]
    at = tl.multiple_of(tl.load(OFFSETS + tl.load(ROW + i)), ALIGN)
    fresh_k = tl.load(FROM_K + i * from_k_row + (h * from_k_head)[:, None] + d[None, :], mask=whole, other=0.0)
    fresh_v = tl.load(FROM_V + i * from_v_row + (h * from_v_head)[:, None] + d[None, :], mask=whole, other=0.0)
    held_k = tl.load(K + at + (h * k_head)[:, None] + d[None, :], mask=whole, other=0.0)
    held_v = tl.load(V + at + (h * v_head)[:, None] + d[None, :], mask=whole, other=0.0)
    k = fresh_k.to(tl.float32) - real(held_k, K_SCALE).to(tl.float32)
    v = fresh_v.to(tl.float32) - real(held_v, V_SCALE).to(tl.float32)
    tl.store(OUT + i, tl.sum(k * k))
    tl.store(OUT + num_rows + i, tl.sum(v * v))


def deviation(keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, kv: KVRows) -> torch.Tensor:
    """How far ``keys`` and ``values`` ``[n, kv_heads, dim]`` are from ``rows`` (int32 ``[n]``) of ``kv``: the sums of
    squares over heads and dims, float32 ``[2, n]``, in one read (CacheBlend's deviation, arXiv:2405.16444)."""
    out = torch.empty((2, len(rows)), dtype=torch.float32, device=keys.device)
    if len(rows):
        launch(
            _deviation_kernel,
            (len(rows),),
            keys,
            values,
            rows,
            kv.offsets,
            kv.keys,
            kv.values,
            kv.key_scale,
            kv.value_scale,
            out,
            len(rows),
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
            num_warps=4,
        )
    return out
