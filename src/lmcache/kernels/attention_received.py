"""The attention that each key gets from a few queries, without the matrix of all weights: the kernel behind
:func:`lmcache.blend.attention.attention_received` on a GPU, which is its reference.

Two passes over the keys: the sums of the softmax, in pieces; then each key's weights, added up over the queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmcache.kernels.join_parts import join_log2_sums
from lmcache.kernels.kv_rows import KVRows
from lmcache.kernels.launch import launch
from lmcache.kernels.sparse_attention import _scores

_BLOCK_N = 64


@triton.jit(do_not_specialize=["num_queries", "num_keys", "window"])
def _received_kernel(
    Q,
    K,
    K_SCALE,
    OFFSETS,
    POSITIONS,
    KNOWN,
    LSE,
    OUT,
    num_queries,
    num_keys,
    scale,
    softcap,
    window,
    q_row,
    q_head,
    k_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KNOWN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head a program. With ``SUMS`` it leaves the piece's log-sum of each query in ``LSE`` ``[blocks, HEADS, n]``,
    else each key's share of the attention in ``OUT`` ``[HEADS, num_keys]``."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = j < num_keys
    at = tl.multiple_of(tl.load(OFFSETS + j, mask=inside, other=0), ALIGN)
    known = inside
    if HAS_KNOWN:
        known &= tl.load(KNOWN + j, mask=inside, other=0) != 0
    k = tl.load(
        K + (head // GROUP).to(tl.int64) * k_head + at[None, :] + d[:, None],
        mask=known[None, :] & (d < DIM)[:, None],
        other=0.0,
    )
    if K_SCALE is not None:
        k = k.to(Q.dtype.element_ty)  # exact
        scale *= tl.load(K_SCALE)
    received = tl.zeros([BLOCK_N], tl.float32)
    for m in range(0, num_queries, BLOCK_M):
        query = m + tl.arange(0, BLOCK_M)
        there = query < num_queries
        position = tl.load(POSITIONS + query, mask=there, other=-1)
        q = tl.load(
            Q + query.to(tl.int64)[:, None] * q_row + head * q_head + d[None, :],
            mask=there[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        s = _scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        sees = (j[None, :] <= position[:, None]) & known[None, :]
        if HAS_WINDOW:
            sees &= j[None, :] > position[:, None] - window
        s = tl.where(sees, s, -1.0e30)
        if SUMS:
            top = tl.max(s, 1)
            total = tl.sum(tl.where(sees, tl.exp2(s - top[:, None]), 0.0), 1)
            lse = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), -1.0e30)
            tl.store(LSE + (block * HEADS + head) * num_queries + query, lse, mask=there)
        else:
            lse = tl.load(LSE + head * num_queries + query, mask=there, other=0.0)
            received += tl.sum(tl.where(sees, tl.exp2(s - lse[:, None]), 0.0), 0)
    if not SUMS:
        tl.store(OUT + head * num_keys + j, received / num_queries, mask=inside)


def attention_received(
    q: torch.Tensor,
    kv: KVRows,
    positions: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each row of ``kv`` gets, averaged over the queries: float32 ``[query_heads, N]``.

    Arguments as in :func:`lmcache.kernels.sparse_attention.sparse_attention`.
    """
    num_queries, heads, dim = q.shape
    num_keys = len(kv.offsets)
    blocks = triton.cdiv(num_keys, _BLOCK_N)
    log_sums = torch.empty((blocks, heads, num_queries), dtype=torch.float32, device=q.device)
    received = torch.empty((heads, num_keys), dtype=torch.float32, device=q.device)

    def run(lse: torch.Tensor, sums: bool) -> None:
        launch(
            _received_kernel,
            (blocks, heads),
            q,
            kv.keys,
            kv.key_scale,
            kv.offsets,
            positions,
            positions if known is None else known,
            lse,
            received,
            num_queries,
            num_keys,
            scale,
            softcap or 0.0,
            sliding_window or 0,
            q.stride(0),
            q.stride(1),
            kv.key_head_stride,
            HEADS=heads,
            GROUP=heads // kv.num_heads,
            DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            BLOCK_M=16,
            BLOCK_N=_BLOCK_N,
            ALIGN=kv.alignment,
            HAS_WINDOW=sliding_window is not None,
            HAS_KNOWN=known is not None,
            HAS_SOFTCAP=softcap is not None,
            SUMS=sums,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=4,
        )

    run(log_sums, True)
    joint = join_log2_sums(log_sums)
    if sinks is not None:
        joint = torch.logaddexp2(joint, sinks.float()[:, None] * 1.4426950408889634)
    run(joint, False)
    return received
