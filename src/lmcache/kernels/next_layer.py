"""Offsets of rows for the next layer, by a kernel that knows itself which one that is.

Recorded and replayed it spares the host to say so. Reference: ``first + distances[at]``, then ``at += 1``.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from lmcache.kernels.launch import launch

_ROWS = 256


@triton.jit(do_not_specialize=["num_rows"])
def _next_layer_kernel(FIRST, DISTANCES, AT, OFFSETS, num_rows, ROWS: tl.constexpr):
    program = tl.program_id(0)
    # Each program counts for itself, and is one warp, so that none reads what another one has counted up already.
    layer = tl.load(AT + program)
    i = program * ROWS + tl.arange(0, ROWS)
    there = i < num_rows
    tl.store(OFFSETS + i, tl.load(FIRST + i, mask=there) + tl.load(DISTANCES + layer), mask=there)
    tl.store(AT + program, layer + 1)


@cache
def compile_for(device: torch.device) -> None:
    """What is run for the first time may not be recorded."""
    zeros = torch.zeros(3, _ROWS, dtype=torch.int64, device=device)
    next_layer(zeros[0], zeros[1], zeros[2, :1], torch.empty_like(zeros[0]))


def layer_counter(num_rows: int, device: torch.device) -> torch.Tensor:
    """For :func:`next_layer`: int64, to be filled with a layer's number."""
    return torch.empty(triton.cdiv(num_rows, _ROWS), dtype=torch.int64, device=device)


def next_layer(first: torch.Tensor, distances: torch.Tensor, at: torch.Tensor, offsets: torch.Tensor) -> None:
    """Fill ``offsets`` with those of the layer that ``at`` is at, and let it be at the next one.

    ``first``: int64 ``[N]``, offsets in the first layer; ``distances``: int64, how far each layer lies behind it.
    """
    launch(_next_layer_kernel, (len(at),), first, distances, at, offsets, len(first), ROWS=_ROWS, num_warps=1)
