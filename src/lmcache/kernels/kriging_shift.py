"""Kriging's second half: the rows of passages are shifted by the weights of :mod:`lmcache.kernels.kriging`.

Reference: :mod:`lmcache.blend.correctors.kriging_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmcache.kernels.fp8 import as_fp8, real
from lmcache.kernels.inverse import PANEL
from lmcache.kernels.kriging import Pieces
from lmcache.kernels.kv_rows import KVRows
from lmcache.kernels.launch import launch

# 70 µs in place of 88 for 16,384 rows of 8 heads of 128, 13 in place of 19 for 4,096 (bfloat16, an H200).
_TILE, _WIDE_TILE = 128, 64


@triton.jit
def _shift_tile(
    piece,
    tile,
    head,
    START,
    LENGTH,
    FIRST,
    COUNT,
    FRESH,
    IS_FRESH,
    OFFSETS,
    HELD,
    SCALE,
    COMPUTED,
    WEIGHTS,
    held_head,
    computed_row,
    computed_head,
    longest,
    padded,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile's rows of one head of K, or of V. Fresh rows stay: others go by them, and they are overwritten next."""
    length = tl.load(LENGTH + piece)
    start = tl.load(START + piece)
    first = tl.load(FIRST + piece)
    count = tl.load(COUNT + piece)
    held = HELD + head * held_head
    computed = COMPUTED + head * computed_head
    i = tile * TILE + tl.arange(0, TILE)
    inside = i < length
    d = tl.arange(0, DIM)
    p = tl.arange(0, PANEL)
    kind = WEIGHTS.dtype.element_ty
    weights = WEIGHTS + piece.to(tl.int64) * longest * padded + i[:, None] * padded
    shift = tl.zeros([TILE, DIM], tl.float32)
    for k in range(0, count, PANEL):
        chosen = k + p < count
        fresh = tl.load(FRESH + first + k + p, mask=chosen, other=0)
        at = tl.multiple_of(tl.load(OFFSETS + fresh, mask=chosen, other=0), ALIGN)
        before = real(tl.load(held + at[:, None] + d[None, :], mask=chosen[:, None], other=0.0), SCALE).to(tl.float32)
        source = computed + (first + k + p)[:, None].to(tl.int64) * computed_row + d[None, :]
        change = tl.load(source, mask=chosen[:, None], other=0.0).to(tl.float32) - before
        w = tl.load(weights + (k + p)[None, :], mask=inside[:, None], other=0.0)
        shift = tl.dot(w, change.to(kind), shift, input_precision=PRECISION)
    row = start + i
    moves = inside & (tl.load(IS_FRESH + row, mask=inside, other=1) == 0)
    at = tl.multiple_of(tl.load(OFFSETS + row, mask=moves, other=0), ALIGN)
    to = held + at[:, None] + d[None, :]
    moved = tl.load(to, mask=moves[:, None], other=0.0).to(tl.float32)
    if SCALE is not None:
        tl.store(to, as_fp8(moved + shift * (1.0 / tl.load(SCALE)), HELD.dtype.element_ty), mask=moves[:, None])
    else:
        tl.store(to, (moved + shift).to(kind), mask=moves[:, None])


@triton.jit(do_not_specialize=["longest", "layer_weights"])
def _shift_kernel(
    START,
    LENGTH,
    FIRST,
    COUNT,
    FRESH,
    IS_FRESH,
    OFFSETS,
    K,
    V,
    K_SCALE,
    V_SCALE,
    COMPUTED_K,
    COMPUTED_V,
    WEIGHTS,
    AT,
    k_head,
    v_head,
    computed_k_row,
    computed_k_head,
    computed_v_row,
    computed_v_head,
    layer_weights,
    longest,
    padded,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """K and V in one launch: one by one they leave half of a GPU idle."""
    piece = tl.program_id(0)
    tile = tl.program_id(1)
    head = tl.program_id(2)
    if AT is not None:
        WEIGHTS += tl.load(AT) * layer_weights
    # fmt: off
    if head < HEADS:
        _shift_tile(piece, tile, head, START, LENGTH, FIRST, COUNT, FRESH, IS_FRESH, OFFSETS,
                    K, K_SCALE, COMPUTED_K, WEIGHTS, k_head, computed_k_row, computed_k_head, longest, padded,
                    DIM, ALIGN, TILE, PANEL, PRECISION)
    else:
        _shift_tile(piece, tile, head - HEADS, START, LENGTH, FIRST, COUNT, FRESH, IS_FRESH, OFFSETS,
                    V, V_SCALE, COMPUTED_V, WEIGHTS, v_head, computed_v_row, computed_v_head, longest, padded,
                    DIM, ALIGN, TILE, PANEL, PRECISION)
    # fmt: on


def krige_shift(
    kv: KVRows,
    pieces: Pieces,
    weights: torch.Tensor,
    fresh_keys: torch.Tensor,
    fresh_values: torch.Tensor,
    at: torch.Tensor | None = None,
) -> None:
    """Shift the rows of ``pieces`` that are not fresh by what the fresh ones show, in place.

    ``weights`` are those of several layers where ``at`` says which one to take (int64 ``[1]``, on the device).
    ``fresh_keys`` and ``fresh_values`` are ``[number of fresh rows of the batch, kv_heads, dim]``, last dim dense; the
    fresh rows of ``kv`` still hold what was moved.
    """
    count, padded = len(pieces.start), pieces.padded
    tile = _TILE if kv.dim <= 128 and weights.dtype != torch.float32 else _WIDE_TILE
    tiles = triton.cdiv(pieces.longest, tile)
    exact = "ieee" if weights.dtype == torch.float32 else "tf32"
    launch(
        _shift_kernel,
        (count, tiles, 2 * kv.num_heads),
        pieces.start,
        pieces.length,
        pieces.first,
        pieces.count,
        pieces.fresh,
        pieces.is_fresh,
        kv.offsets,
        kv.keys,
        kv.values,
        kv.key_scale,
        kv.value_scale,
        fresh_keys,
        fresh_values,
        weights,
        at,
        kv.key_head_stride,
        kv.value_head_stride,
        *fresh_keys.stride()[:2],
        *fresh_values.stride()[:2],
        count * pieces.longest * padded,
        pieces.longest,
        padded,
        HEADS=kv.num_heads,
        DIM=kv.dim,
        ALIGN=kv.alignment,
        TILE=tile,
        PANEL=PANEL,
        PRECISION=exact,
        num_warps=4,
    )
