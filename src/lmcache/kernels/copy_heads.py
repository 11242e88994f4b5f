"""Copies of the q, k and v of some tokens, in one launch. Reference: ``Tensor.copy_`` of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lmcache.kernels.launch import launch

_BLOCK = 1024


@triton.jit
def _copy_part(FROM, TO, row, part, from_row, NUMEL: tl.constexpr, BLOCK: tl.constexpr):
    i = part * BLOCK + tl.arange(0, BLOCK)
    tl.store(TO + row * NUMEL + i, tl.load(FROM + row * from_row + i, mask=i < NUMEL), mask=i < NUMEL)


@triton.jit
def _copy_heads_kernel(
    Q,
    K,
    V,
    TO_Q,
    TO_K,
    TO_V,
    q_row,
    k_row,
    v_row,
    Q_NUMEL: tl.constexpr,
    K_NUMEL: tl.constexpr,
    V_NUMEL: tl.constexpr,
    Q_PARTS: tl.constexpr,
    K_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < Q_PARTS:
        _copy_part(Q, TO_Q, row, part, q_row, Q_NUMEL, BLOCK)
    elif part < Q_PARTS + K_PARTS:
        _copy_part(K, TO_K, row, part - Q_PARTS, k_row, K_NUMEL, BLOCK)
    else:
        _copy_part(V, TO_V, row, part - Q_PARTS - K_PARTS, v_row, V_NUMEL, BLOCK)


def copy_heads(heads: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> bool:
    """Copy ``heads``, the q, k and v ``[n, heads, dim]`` of ``n`` tokens, into ``to``, dense ones of the same shapes
    and dtypes. False where they do not lie as models compute them, head by head in each row: nothing is copied then."""
    for x, room in zip(heads, to, strict=True):
        if x.stride()[1:] != (x.shape[2], 1) or not room.is_contiguous() or room.dtype != x.dtype:
            return False
    numels = [x.shape[1] * x.shape[2] for x in heads]
    parts = [triton.cdiv(numel, _BLOCK) for numel in numels]
    launch(
        _copy_heads_kernel,
        (len(heads[0]), sum(parts)),
        *heads,
        *to,
        *(x.stride(0) for x in heads),
        Q_NUMEL=numels[0],
        K_NUMEL=numels[1],
        V_NUMEL=numels[2],
        Q_PARTS=parts[0],
        K_PARTS=parts[1],
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return True
