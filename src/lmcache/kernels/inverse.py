"""The inverses of many small positive definite matrices, in one launch. Reference: ``torch.linalg.inv``.

torch solves such batches with hundreds of launches; for matrices of some 150 rows these take longer than the work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmcache.kernels.launch import launch

PANEL = 16
"""Rows and columns that are eliminated at a time: the size of a matrix must be a multiple of it."""
_TILE = 64


@triton.jit(do_not_specialize=["sizes"])
def _inverse_kernel(COUNT, AMONG, padded, sizes, PANEL: tl.constexpr, TILE: tl.constexpr):
    """In place, by Gauss and Jordan's method, a panel of rows and columns at a time. A positive definite matrix needs
    no pivoting."""
    piece = tl.program_id(0)
    count = tl.load(COUNT + piece % sizes)
    base = AMONG + piece.to(tl.int64) * padded * padded
    p = tl.arange(0, PANEL)
    t = tl.arange(0, TILE)
    for begin in range(0, count, PANEL):
        here = base + (begin + p)[:, None] * padded + (begin + p)[None, :]
        corner = tl.load(here)
        for k in range(PANEL):
            row = tl.sum(tl.where(p[:, None] == k, corner, 0.0), 0)
            column = tl.sum(tl.where(p[None, :] == k, corner, 0.0), 1)
            pivot = 1.0 / tl.sum(tl.where(p == k, row, 0.0))
            row = row * pivot
            swept = corner - column[:, None] * tl.where(p == k, 1.0 + pivot, row)[None, :]
            corner = tl.where((p == k)[:, None], tl.where(p == k, pivot, row)[None, :], swept)
        tl.debug_barrier()
        for other in range(0, padded, TILE):
            j = other + t
            outside = (j < padded) & ((j < begin) | (j >= begin + PANEL))
            to = base + (begin + p)[:, None] * padded + j[None, :]
            rows = tl.load(to, mask=outside[None, :], other=0.0)
            tl.store(to, tl.dot(corner, rows, input_precision="ieee"), mask=outside[None, :])
        tl.debug_barrier()
        for down in range(0, padded, TILE):
            i = down + t
            below = (i < padded) & ((i < begin) | (i >= begin + PANEL))
            from_columns = base + i[:, None] * padded + (begin + p)[None, :]
            columns = tl.load(from_columns, mask=below[:, None], other=0.0)
            for other in range(0, padded, TILE):
                j = other + t
                outside = (j < padded) & ((j < begin) | (j >= begin + PANEL))
                rows = tl.load(base + (begin + p)[:, None] * padded + j[None, :], mask=outside[None, :], other=0.0)
                to = base + i[:, None] * padded + j[None, :]
                both = below[:, None] & outside[None, :]
                rest = tl.load(to, mask=both, other=0.0)
                tl.store(to, rest - tl.dot(columns, rows, input_precision="ieee"), mask=both)
            tl.debug_barrier()
            tl.store(from_columns, -tl.dot(columns, corner, input_precision="ieee"), mask=below[:, None])
        tl.store(here, corner)
        tl.debug_barrier()


def invert(matrices: torch.Tensor, sizes: torch.Tensor) -> None:
    """Replace each of ``matrices`` (float32 ``[S, m, m]``, dense, ``m`` a multiple of :data:`PANEL`) by its inverse.

    ``sizes`` (int32, on the device): the rows and columns of each that matter, over again where there are fewer than
    ``S``; beyond them it is diagonal, and what lies there is undefined afterwards.
    """
    count, size, _ = matrices.shape
    launch(
        _inverse_kernel, (count,), sizes, matrices, size, len(sizes), PANEL=PANEL, TILE=_TILE, num_warps=4, num_stages=1
    )
