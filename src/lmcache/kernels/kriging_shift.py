"""Kriging's second half: the rows of passages are shifted by the weights of :mod:`lmcache.kernels.kriging`.

Reference: :mod:`lmcache.blend.correctors.kriging_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmcache.kernels.fp8 import as_fp8, real
from lmcache.kernels.kriging import Pieces
from lmcache.kernels.kv_rows import KVRows
from lmcache.kernels.launch import launch

_CHANGE_ROWS = 16
# 14 µs for 4,096 rows of 8 heads of 128 with 7.5 % fresh ones, 56 for 16,384 and 110 for 32,768 (bfloat16, an H200), of
# which 2, 3 and 5 are for the changes; 19, 79 and 158 where every tile looked up the fresh rows by itself.
_TILE, _WIDE_TILE, _BLOCK = 128, 64, 32


@triton.jit
def _change_rows(
    rows,
    head,
    total,
    FRESH,
    OFFSETS,
    HELD,
    SCALE,
    COMPUTED,
    to,
    held_head,
    computed_row,
    computed_head,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    inside = rows < total
    d = tl.arange(0, DIM)
    fresh = tl.load(FRESH + rows, mask=inside, other=0)
    at = tl.multiple_of(tl.load(OFFSETS + fresh, mask=inside, other=0), ALIGN)
    held = HELD + head * held_head + at[:, None] + d[None, :]
    before = real(tl.load(held, mask=inside[:, None], other=0.0), SCALE).to(tl.float32)
    source = COMPUTED + head * computed_head + rows[:, None].to(tl.int64) * computed_row + d[None, :]
    change = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32) - before
    tl.store(to + rows[:, None] * DIM + d[None, :], change.to(to.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["total"])
def _change_kernel(
    FRESH,
    OFFSETS,
    K,
    V,
    K_SCALE,
    V_SCALE,
    COMPUTED_K,
    COMPUTED_V,
    CHANGES,
    k_head,
    v_head,
    computed_k_row,
    computed_k_head,
    computed_v_row,
    computed_v_head,
    total,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What computed rows are more than those that were moved, of one head of K or of V."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    to = CHANGES + head.to(tl.int64) * total * DIM
    # fmt: off
    if head < HEADS:
        _change_rows(rows, head, total, FRESH, OFFSETS, K, K_SCALE, COMPUTED_K, to,
                     k_head, computed_k_row, computed_k_head, DIM, ALIGN)
    else:
        _change_rows(rows, head - HEADS, total, FRESH, OFFSETS, V, V_SCALE, COMPUTED_V, to,
                     v_head, computed_v_row, computed_v_head, DIM, ALIGN)
    # fmt: on


@triton.jit
def _add(HELD, SCALE, at, moves, shift, DIM: tl.constexpr):
    to = HELD + at[:, None] + tl.arange(0, DIM)[None, :]
    moved = tl.load(to, mask=moves[:, None], other=0.0).to(tl.float32)
    if SCALE is not None:
        tl.store(to, as_fp8(moved + shift * (1.0 / tl.load(SCALE)), HELD.dtype.element_ty), mask=moves[:, None])
    else:
        tl.store(to, (moved + shift).to(HELD.dtype.element_ty), mask=moves[:, None])


@triton.jit(do_not_specialize=["total", "longest", "layer_weights"])
def _shift_kernel(
    START,
    LENGTH,
    FIRST,
    COUNT,
    IS_FRESH,
    OFFSETS,
    K,
    V,
    K_SCALE,
    V_SCALE,
    CHANGES,
    WEIGHTS,
    AT,
    k_head,
    v_head,
    total,
    layer_weights,
    longest,
    padded,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile's rows of one head of K, or of V. Fresh rows stay as they are: they are overwritten next.

    K and V in one launch: one by one they leave half of a GPU idle.
    """
    piece = tl.program_id(0)
    head = tl.program_id(2)
    if AT is not None:
        WEIGHTS += tl.load(AT) * layer_weights
    start = tl.load(START + piece)
    count = tl.load(COUNT + piece)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = i < tl.load(LENGTH + piece)
    moves = inside & (tl.load(IS_FRESH + start + i, mask=inside, other=1) == 0)
    at = tl.multiple_of(tl.load(OFFSETS + start + i, mask=moves, other=0), ALIGN)
    d = tl.arange(0, DIM)
    b = tl.arange(0, BLOCK)
    weights = WEIGHTS + piece.to(tl.int64) * longest * padded + i[:, None] * padded + b[None, :]
    changes = CHANGES + (head.to(tl.int64) * total + tl.load(FIRST + piece) + b[:, None]) * DIM + d[None, :]
    shift = tl.zeros([TILE, DIM], tl.float32)
    for k in range(0, count, BLOCK):
        # From ``count`` on weights are zero, and changes are those of another piece.
        w = tl.load(weights + k, mask=inside[:, None] & (k + b < padded)[None, :], other=0.0)
        change = tl.load(changes + k * DIM, mask=(k + b < count)[:, None], other=0.0)
        shift = tl.dot(w, change, shift, input_precision=PRECISION)
    if head < HEADS:
        _add(K + head * k_head, K_SCALE, at, moves, shift, DIM)
    else:
        _add(V + (head - HEADS) * v_head, V_SCALE, at, moves, shift, DIM)


def changes_of(kv: KVRows, fresh: torch.Tensor, fresh_keys: torch.Tensor, fresh_values: torch.Tensor) -> torch.Tensor:
    """What fresh rows differ by from those that ``kv`` still holds, all heads of K and then those of V.

    Args:
        fresh: int32 ``[F]``, rows of ``kv``, on the device.
        fresh_keys: ``[F, kv_heads, dim]``, last dim dense; ``fresh_values`` likewise.

    Returns:
        ``[2 · kv_heads, F, dim]`` in the dtype of ``fresh_keys``.
    """
    total = len(fresh)
    changes = fresh_keys.new_empty((2 * kv.num_heads, total, kv.dim))
    launch(
        _change_kernel,
        (triton.cdiv(total, _CHANGE_ROWS), 2 * kv.num_heads),
        fresh,
        kv.offsets,
        kv.keys,
        kv.values,
        kv.key_scale,
        kv.value_scale,
        fresh_keys,
        fresh_values,
        changes,
        kv.key_head_stride,
        kv.value_head_stride,
        *fresh_keys.stride()[:2],
        *fresh_values.stride()[:2],
        total,
        HEADS=kv.num_heads,
        DIM=kv.dim,
        ALIGN=kv.alignment,
        ROWS=_CHANGE_ROWS,
        num_warps=4,
    )
    return changes


def krige_shift(
    kv: KVRows, pieces: Pieces, weights: torch.Tensor, changes: torch.Tensor, at: torch.Tensor | None = None
) -> None:
    """Shift the rows of ``pieces`` that are not fresh by what the fresh ones show, in place.

    ``weights`` are those of several layers where ``at`` says which one to take (int64 ``[1]``, on the device).
    ``changes`` are :func:`changes_of` ``pieces.fresh``, in the dtype of the weights.
    """
    count, padded = len(pieces.start), pieces.padded
    wide = kv.dim > 128 or weights.dtype == torch.float32
    tile = _WIDE_TILE if wide else _TILE
    launch(
        _shift_kernel,
        (count, triton.cdiv(pieces.longest, tile), 2 * kv.num_heads),
        pieces.start,
        pieces.length,
        pieces.first,
        pieces.count,
        pieces.is_fresh,
        kv.offsets,
        kv.keys,
        kv.values,
        kv.key_scale,
        kv.value_scale,
        changes,
        weights,
        at,
        kv.key_head_stride,
        kv.value_head_stride,
        changes.shape[1],
        count * pieces.longest * padded,
        pieces.longest,
        padded,
        HEADS=kv.num_heads,
        DIM=kv.dim,
        ALIGN=kv.alignment,
        TILE=tile,
        BLOCK=_BLOCK,
        PRECISION="ieee" if weights.dtype == torch.float32 else "tf32",
        num_warps=4,
    )
