"""Attention of scattered queries over KV whose rows lie anywhere: the kernel behind
:func:`lmcache.blend.attention.sparse_attention` on a GPU, which is its reference.

The scheme is FlashAttention's (Dao 2023, arXiv:2307.08691) with another mask, ``kv position ≤ query position``: the
queries of one KV head stand in a tile together, keys before the tile's first position need no mask, keys behind its
last one are never read. Few queries are split over the keys (flash decoding), so that they fill the GPU all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lmcache.kernels.attention_tiles import Tile, blocks_of_a_part, blocks_seen, masked_stages, padded_dim, tile
from lmcache.kernels.join_parts import join_attention
from lmcache.kernels.kv_rows import KVRows
from lmcache.kernels.launch import launch

_LOG2_E = tl.constexpr(1.4426950408889634)
# A score that weighs nothing; −inf would make NaN of rows that see nothing in a tile.
_HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def _scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """In units of log2."""
    s = tl.dot(q, k, input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        x = s / softcap
        capped = 2.0 / (1.0 + tl.exp2(x * (-2.0 * _LOG2_E))) - 1.0
        if PRECISION == "ieee":
            # What is left of 1 − 1 would be wrong in the last digits: near zero, tanh by its series (DLMF 4.33.3).
            y = x * x
            series = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))))
            capped = tl.where(y < 0.0625, series, capped)
        s = softcap * capped
    return s * _LOG2_E


@triton.jit(do_not_specialize=["num_queries", "window", "out_split", "lse_split", "part_keys"])
def _attend_kernel(
    Q,
    K,
    V,
    K_SCALE,
    V_SCALE,
    OFFSETS,
    POSITIONS,
    KNOWN,
    SINKS,
    OUT,
    LSE,
    SEEN,
    SEEN_OUT,
    SEEN_LSE,
    num_queries,
    scale,
    softcap,
    window,
    q_row,
    q_head,
    out_split,
    out_row,
    out_head,
    lse_split,
    k_head,
    v_head,
    part_keys,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KNOWN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SEEN_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last tiles have the most keys, so they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = r // GROUP
    head = kv_head * GROUP + r % GROUP
    there = query < num_queries
    d = tl.arange(0, BLOCK_D)
    q = tl.load(
        Q + query.to(tl.int64)[:, None] * q_row + head[:, None] * q_head + d[None, :],
        mask=there[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    if K_SCALE is not None:
        scale *= tl.load(K_SCALE)
        if q.dtype == tl.bfloat16:
            # A GPU turns two numbers of fp8 into float16 at once, and into bfloat16 by way of float16. A 16th of a
            # query is as exact as the query, and never too large.
            q = (q.to(tl.float32) * 0.0625).to(tl.float16)
            scale *= 16.0
    position = tl.load(POSITIONS + query, mask=there, other=-1)
    last = tl.max(position)
    first = tl.min(tl.where(there, position, 1 << 30))
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    if SEEN_TOKENS > 0:
        start = tl.load(SEEN + tile * BLOCK_M // GROUP // SEEN_TOKENS)
    end = last + 1
    if IS_SPLIT:
        start += split * part_keys
        if start >= end:
            nothing = tl.full([BLOCK_M], _HIDDEN, tl.float32)
            tl.store(LSE + split * lse_split + query * HEADS + head, nothing, mask=there)
            return
        end = tl.minimum(end, start + part_keys)
    # Up to here every query sees every key, as far as positions go.
    unmasked_end = start
    if not (HAS_WINDOW or HAS_KNOWN):
        unmasked_end += tl.maximum(tl.minimum(first + 1, end) - start, 0) // BLOCK_N * BLOCK_N

    if SEEN_TOKENS > 0:
        run = query // SEEN_TOKENS
        seen = num_queries - tl.minimum((run + 1) * SEEN_TOKENS, num_queries) + query - run * SEEN_TOKENS
        top = tl.load(SEEN_LSE + head * num_queries + seen, mask=there, other=0.0) * _LOG2_E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.load(
            SEEN_OUT + (seen.to(tl.int64) * HEADS + head)[:, None] * V_DIM + d[None, :],
            mask=there[:, None] & (d < V_DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
    else:
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_base = K + kv_head.to(tl.int64) * k_head
    v_base = V + kv_head.to(tl.int64) * v_head

    for n in tl.range(start, unmasked_end, BLOCK_N, num_stages=STAGES):
        j = n + tl.arange(0, BLOCK_N)
        at = tl.multiple_of(tl.load(OFFSETS + j), ALIGN)
        if DIM == BLOCK_D:
            k = tl.load(k_base + at[None, :] + d[:, None])
        else:
            k = tl.load(k_base + at[None, :] + d[:, None], mask=(d < DIM)[:, None], other=0.0)
        if K_SCALE is not None:
            k = k.to(q.dtype)  # exact
        s = _scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, 1)
        if V_DIM == BLOCK_D:
            v = tl.load(v_base + at[:, None] + d[None, :])
        else:
            v = tl.load(v_base + at[:, None] + d[None, :], mask=(d < V_DIM)[None, :], other=0.0)
        if V_SCALE is not None:
            v = v.to(q.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = higher

    for n in tl.range(unmasked_end, end, BLOCK_N, num_stages=MASKED_STAGES):
        j = n + tl.arange(0, BLOCK_N)
        inside = j < end
        at = tl.multiple_of(tl.load(OFFSETS + j, mask=inside, other=0), ALIGN)
        if HAS_KNOWN:
            inside &= tl.load(KNOWN + j, mask=inside, other=0) != 0
        k = tl.load(k_base + at[None, :] + d[:, None], mask=inside[None, :] & (d < DIM)[:, None], other=0.0)
        if K_SCALE is not None:
            k = k.to(q.dtype)
        s = _scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        sees = (j[None, :] <= position[:, None]) & inside[None, :]
        if HAS_WINDOW:
            sees &= j[None, :] > position[:, None] - window
        s = tl.where(sees, s, _HIDDEN)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, 1)
        v = tl.load(v_base + at[:, None] + d[None, :], mask=inside[:, None] & (d < V_DIM)[None, :], other=0.0)
        if V_SCALE is not None:
            v = v.to(q.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = higher

    if HAS_SINKS:
        # The parts of the keys have one sink together.
        sink = tl.load(SINKS + head, mask=there, other=0.0).to(tl.float32) * _LOG2_E
        sink = tl.where(split == 0, sink, _HIDDEN)
        higher = tl.maximum(top, sink)
        decay = tl.exp2(top - higher)
        total = total * decay + tl.exp2(sink - higher)
        acc = acc * decay[:, None]
        top = higher
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if V_SCALE is not None:
        acc *= tl.load(V_SCALE)
    tl.store(
        OUT + split * out_split + query.to(tl.int64)[:, None] * out_row + head[:, None] * out_head + d[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=there[:, None] & (d < V_DIM)[None, :],
    )
    if IS_SPLIT:
        lse = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), _HIDDEN)
        tl.store(LSE + split * lse_split + query * HEADS + head, lse / _LOG2_E, mask=there)


@dataclass(frozen=True)
class SeenByAll:
    """What other code computed of the same queries over the first keys: those that all queries of a run see.

    A run is ``tokens`` queries in order, of which run ``r`` saw the first ``keys[r]`` keys (int32, on the device).
    ``out``: ``[n, query_heads, value_dim]``, dense; ``lse``: the logarithms of the softmax sums, float32
    ``[query_heads, n]``; both with the queries of the last run first.
    """

    tokens: int
    keys: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


def sparse_attention(
    q: torch.Tensor,
    kv: KVRows,
    positions: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    seen_by_all: SeenByAll | None = None,
    positions_on_host: torch.Tensor | None = None,
    part_keys: int | None = None,
    blocks: Tile | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of ``q`` ``[n, query_heads, dim]`` (last dim dense) over the rows of ``kv``, one prompt.

    Row ``j`` of ``kv`` is position ``j``. ``positions``: int32 ``[n]`` on the device, ascending. Other arguments as in
    :class:`lmcache.blend.host.Attend` and :class:`lmcache.blend.attention.QueryMask`; every query sees a known key.

    Args:
        seen_by_all: a part that is done already; not with ``sliding_window``, ``sinks``, ``known`` or fp8. A tile of
            queries must lie within a run of it.
        positions_on_host: int64 ``[n]``, on the CPU: says how to cut the keys, which else goes by a guess.
        part_keys: keys that one program reads at most, a multiple of the tile of keys; None: as many as fill the GPU.
        blocks: None: those that are fastest.
        out: where the outcome belongs, dense.

    Returns:
        ``out``, or ``[n, query_heads, value_dim]`` in the dtype of ``q``; and, where the keys were split, the logarithm
        of each row's softmax sum, float32 ``[n, query_heads]``, else None.
    """
    num_queries, heads, dim = q.shape
    num_keys = len(kv.offsets)
    group = heads // kv.num_heads
    block_d = padded_dim(dim, kv.value_dim)
    rows = num_queries * group
    if blocks is None:
        blocks = tile(rows, kv.num_heads, block_d, q, is_band=seen_by_all is not None)
    block_m, block_n, warps, stages = blocks
    tiles = triton.cdiv(rows, block_m)
    if seen_by_all is not None:
        part_keys = num_keys
        if seen_by_all.tokens * group % block_m:
            raise ValueError(f"tiles of {block_m} queries × heads do not lie in runs of {seen_by_all.tokens} × {group}")
        if not (sliding_window is None and sinks is None and known is None and kv.key_scale is None):
            raise ValueError("a part that all see cannot be joined with a window, sinks, hidden keys or fp8")
    seen_keys = num_keys
    if part_keys is None:
        seen = blocks_seen(num_queries, group, num_keys, blocks, positions_on_host, sliding_window)
        part_bytes = 4 * num_queries * heads * kv.value_dim
        part_keys = block_n * blocks_of_a_part(seen, kv.num_heads, part_bytes, block_d, q.device)
        seen_keys = block_n * max(seen)
    splits = triton.cdiv(seen_keys, part_keys)
    if out is None:
        out = torch.empty((num_queries, heads, kv.value_dim), dtype=q.dtype, device=q.device)
    parts = out[None]
    if splits > 1:
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
    lse = torch.empty((splits, num_queries, heads), dtype=torch.float32, device=q.device)
    launch(
        _attend_kernel,
        (tiles, kv.num_heads, splits),
        q,
        kv.keys,
        kv.values,
        kv.key_scale,
        kv.value_scale,
        kv.offsets,
        positions,
        positions if known is None else known,
        q if sinks is None else sinks,
        parts,
        lse,
        positions if seen_by_all is None else seen_by_all.keys,
        q if seen_by_all is None else seen_by_all.out,
        lse if seen_by_all is None else seen_by_all.lse,
        num_queries,
        scale,
        softcap or 0.0,
        sliding_window or 0,
        q.stride(0),
        q.stride(1),
        parts.stride(0),
        parts.stride(1),
        parts.stride(2),
        lse.stride(0),
        kv.key_head_stride,
        kv.value_head_stride,
        part_keys,
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        V_DIM=kv.value_dim,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        ALIGN=kv.alignment,
        HAS_WINDOW=sliding_window is not None,
        HAS_KNOWN=known is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        IS_SPLIT=splits > 1,
        SEEN_TOKENS=0 if seen_by_all is None else seen_by_all.tokens,
        STAGES=stages,
        MASKED_STAGES=masked_stages(is_fp8=kv.key_scale is not None, is_padded=min(dim, kv.value_dim) < block_d),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps,
    )
    return (out, None) if splits == 1 else (out, join_attention(parts, lse, out))
