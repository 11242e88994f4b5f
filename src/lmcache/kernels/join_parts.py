"""Joins what was computed over parts of the keys: attention, or the sums of its softmax. References: ``logsumexp`` and
the weighted sum.

One launch in place of half a dozen of torch's, which for few queries take longer than the attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmcache.kernels.launch import launch

_LOG2_E = tl.constexpr(1.4426950408889634)
_ROWS, _PARTS = 8, 32


@triton.jit(do_not_specialize=["num_rows", "parts"])
def _join_attention_kernel(
    PARTS,
    LSE,
    OUT,
    JOINT,
    num_rows,
    parts,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = r < num_rows
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (d < DIM)[None, :]
    top = tl.full([ROWS], -float("inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(LSE + part * num_rows + r, mask=there, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for part in range(parts):
        weight = tl.exp2((tl.load(LSE + part * num_rows + r, mask=there, other=0.0) - top) * _LOG2_E)
        at = (part * num_rows + r).to(tl.int64) * DIM
        # Nothing was written where a part weighs nothing.
        weighs = mask & (weight > 0.0)[:, None]
        acc += weight[:, None] * tl.load(PARTS + at[:, None] + d[None, :], mask=weighs, other=0.0)
        total += weight
    to = OUT + (r.to(tl.int64) * DIM)[:, None] + d[None, :]
    tl.store(to, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=mask)
    tl.store(JOINT + r, top + tl.log2(total) / _LOG2_E, mask=there)


def join_attention(parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Args:
        parts: attention over each part of the keys, float32 ``[S, n, heads, dim]``, dense. May be anything where its
            part weighs nothing.
        lse: the logarithms of the softmax sums, float32 ``[S, n, heads]``; some part of each row is not −inf.
        out: ``[n, heads, dim]``, dense: what is to be filled with attention over all of them.

    Returns:
        The joint logarithms, float32 ``[n, heads]``.
    """
    count, num_queries, heads, dim = parts.shape
    joint = torch.empty((num_queries, heads), dtype=torch.float32, device=parts.device)
    rows = num_queries * heads
    launch(
        _join_attention_kernel,
        (triton.cdiv(rows, _ROWS),),
        parts,
        lse,
        out,
        joint,
        rows,
        count,
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        ROWS=_ROWS,
    )
    return joint


@triton.jit(do_not_specialize=["num_rows", "parts"])
def _join_sums_kernel(SUMS, JOINT, num_rows, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = r < num_rows
    p = tl.arange(0, PARTS)
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + p
        mask = (part < parts)[:, None] & there[None, :]
        sums = tl.load(SUMS + part[:, None] * num_rows + r[None, :], mask=mask, other=-1.0e30)
        higher = tl.maximum(top, tl.max(sums, 0))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(sums - higher[None, :]), 0)
        top = higher
    tl.store(JOINT + r, top + tl.log2(total), mask=there)


def join_log2_sums(sums: torch.Tensor) -> torch.Tensor:
    """``log2(Σ 2^sums)`` over the first dimension of ``sums``, float32, dense; none is below −10³⁰."""
    joint = torch.empty(sums.shape[1:], dtype=torch.float32, device=sums.device)
    rows = joint.numel()
    launch(_join_sums_kernel, (triton.cdiv(rows, _ROWS),), sums, joint, rows, len(sums), ROWS=_ROWS, PARTS=_PARTS)
    return joint
