"""Kriging of many passages at once: the kernels behind :mod:`lmcache.blend.correctors.kriging_rows`, which has the
formulas and is their reference. Here the weights, by five launches for any number of passages and layers;
:mod:`lmcache.kernels.kriging_shift` goes by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lmcache.kernels.inverse import PANEL, invert
from lmcache.kernels.kv_rows import KVLayers, KVRows
from lmcache.kernels.launch import launch

_TILE = 64
# One variant for all pieces up to 1,024 rows: a new one would be compiled while a request waits.
_FEWEST_BLOCK_TILES = 16
MAX_FRESH = 512
"""Fresh rows a piece: its matrix is inverted by one program, in the cache of one multiprocessor."""


@dataclass(frozen=True)
class Pieces:
    """``S`` pieces of passages: piece ``s`` is the rows ``start[s] …`` of the batch, ``length[s]`` of them, and its
    ``count[s]`` fresh ones are ``fresh[first[s] …]``. int32, on the device.

    ``is_fresh``: uint8 ``[N]``. ``longest`` and ``most`` are the largest length and count.
    """

    start: torch.Tensor
    length: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    fresh: torch.Tensor
    is_fresh: torch.Tensor
    longest: int
    most: int

    @property
    def padded(self) -> int:
        """Room for the fresh rows of a piece."""
        return -(-self.most // PANEL) * PANEL

    def room_for_weights(self, dtype: torch.dtype, layers: int = 1) -> torch.Tensor:
        shape = layers * len(self.start), self.longest, self.padded
        return torch.empty(shape, dtype=dtype, device=self.start.device)


@triton.jit(do_not_specialize=["DISTANCES", "pieces"])
def _sums_kernel(
    START,
    LENGTH,
    OFFSETS,
    DISTANCES,
    K,
    SUMS,
    k_head,
    pieces,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sum and the sum of squares of the keys of a tile."""
    piece = tl.program_id(0)  # all of a layer, then those of the next
    of_layer = piece % pieces
    tile = tl.program_id(1)
    i = tile * TILE + tl.arange(0, TILE)
    inside = i < tl.load(LENGTH + of_layer)
    at = tl.multiple_of(tl.load(OFFSETS + tl.load(START + of_layer) + i, mask=inside, other=0), ALIGN)
    if DISTANCES is not None:
        K += tl.multiple_of(tl.load(DISTANCES + piece // pieces), ALIGN)
    d = tl.arange(0, DIM)
    total = tl.zeros([TILE], tl.float32)
    squares = tl.zeros([TILE], tl.float32)
    for h in range(HEADS):
        k = tl.load(K + h * k_head + at[:, None] + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        total += tl.sum(k, 1)
        squares += tl.sum(k * k, 1)
    to = (piece * tl.num_programs(1) + tile) * 2
    tl.store(SUMS + to, tl.sum(total))
    tl.store(SUMS + to + 1, tl.sum(squares))


@triton.jit(do_not_specialize=["DISTANCES", "longest", "tiles", "pieces"])
def _covariance_kernel(
    START,
    LENGTH,
    FIRST,
    COUNT,
    FRESH,
    OFFSETS,
    DISTANCES,
    K,
    SUMS,
    COVARIANCE,
    AMONG,
    passage,
    local,
    width,
    alike,
    reach,
    noise,
    k_head,
    longest,
    padded,
    tiles,
    pieces,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    AMONG_FRESH: tl.constexpr,
):
    """Of the rows of a tile with a tile of the fresh ones; with ``AMONG_FRESH`` the rows are the fresh ones too."""
    piece = tl.program_id(0)
    of_layer = piece % pieces
    length = tl.load(LENGTH + of_layer)
    start = tl.load(START + of_layer)
    first = tl.load(FIRST + of_layer)
    count = tl.load(COUNT + of_layer)
    if DISTANCES is not None:
        K += tl.multiple_of(tl.load(DISTANCES + piece // pieces), ALIGN)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = tl.program_id(2) * TILE + tl.arange(0, TILE)
    chosen = j < count
    fresh = tl.load(FRESH + first + j, mask=chosen, other=0)
    if AMONG_FRESH:
        inside = i < count
        row = tl.load(FRESH + first + i, mask=inside, other=0)
    else:
        inside = i < length
        row = start + i
    at = tl.multiple_of(tl.load(OFFSETS + row, mask=inside, other=0), ALIGN)
    fresh_at = tl.multiple_of(tl.load(OFFSETS + fresh, mask=chosen, other=0), ALIGN)
    d = tl.arange(0, DIM)
    products = tl.zeros([TILE, TILE], tl.float32)
    squares = tl.zeros([TILE], tl.float32)
    fresh_squares = tl.zeros([TILE], tl.float32)
    for h in range(HEADS):
        k = tl.load(K + h * k_head + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
        f = tl.load(K + h * k_head + fresh_at[:, None] + d[None, :], mask=chosen[:, None], other=0.0)
        if K.dtype.element_ty.is_fp8():
            # Exact. Without their scale: keys count here by how alike they are among themselves.
            k = k.to(tl.float16)
            f = f.to(tl.float16)
        products = tl.dot(k, tl.trans(f), products, input_precision=PRECISION)
        wide = k.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        wide_f = f.to(tl.float32)
        fresh_squares += tl.sum(wide_f * wide_f, 1)
    t = tl.arange(0, BLOCK_TILES)
    of_tile = SUMS + (piece * tiles + t) * 2
    elements = length.to(tl.float32) * HEADS * DIM
    mean = tl.sum(tl.load(of_tile, mask=t < tiles, other=0.0)) / elements
    variance = tl.sum(tl.load(of_tile + 1, mask=t < tiles, other=0.0)) / elements - mean * mean
    unit = tl.maximum(reach * variance, 1.0e-30) * (HEADS * DIM)
    apart = (squares[:, None] + fresh_squares[None, :] - 2.0 * products) / unit
    distance = (row[:, None] - fresh[None, :]).to(tl.float32) / width
    found = passage + local * tl.exp(-0.5 * distance * distance) + alike * tl.exp(-tl.maximum(apart, 0.0))
    found = tl.where(inside[:, None] & chosen[None, :], found, 0.0)
    if AMONG_FRESH:
        # Room that no fresh row fills is a unit matrix: it has no part in the inverse of the rest.
        found += tl.where(i[:, None] == j[None, :], noise, 0.0)
        to = AMONG + piece.to(tl.int64) * padded * padded + i[:, None] * padded + j[None, :]
        tl.store(to, found, mask=(i < padded)[:, None] & (j < padded)[None, :])
    else:
        to = COVARIANCE + piece.to(tl.int64) * longest * padded + i[:, None] * padded + j[None, :]
        tl.store(to, found, mask=inside[:, None] & (j < padded)[None, :])


@triton.jit(do_not_specialize=["longest", "pieces"])
def _weights_kernel(
    LENGTH,
    COUNT,
    COVARIANCE,
    INVERSE,
    WEIGHTS,
    longest,
    padded,
    pieces,
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    piece = tl.program_id(0)
    of_layer = piece % pieces
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = tl.program_id(2) * TILE + tl.arange(0, TILE)
    count = tl.load(COUNT + of_layer)
    inside = i < tl.load(LENGTH + of_layer)
    p = tl.arange(0, PANEL)
    covariance = COVARIANCE + piece.to(tl.int64) * longest * padded + i[:, None] * padded
    inverse = INVERSE + piece.to(tl.int64) * padded * padded + j[None, :]
    weights = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, count, PANEL):
        c = tl.load(covariance + (k + p)[None, :], mask=inside[:, None], other=0.0)
        a = tl.load(inverse + (k + p)[:, None] * padded, mask=(j < padded)[None, :], other=0.0)
        weights = tl.dot(c, a, weights, input_precision=PRECISION)
    to = WEIGHTS + piece.to(tl.int64) * longest * padded + i[:, None] * padded + j[None, :]
    tl.store(to, weights.to(WEIGHTS.dtype.element_ty), mask=inside[:, None] & (j < padded)[None, :])


def can_krige(kv: KVRows, most: int) -> bool:
    """Whether :func:`krige` takes pieces of ``most`` fresh rows at most."""
    dim = kv.dim
    return most <= MAX_FRESH and dim == kv.value_dim and dim in (16, 32, 64, 128, 256)


def krige_weights(
    kv: KVLayers,
    pieces: Pieces,
    weights: torch.Tensor,
    *,
    passage: float,
    local: float,
    width: float,
    alike: float,
    reach: float,
    noise: float,
) -> None:
    """Into ``weights`` (``[layers · S, longest, padded]``, in the dtype of fresh keys): how much the change of each
    fresh row counts for each row of its piece. Hangs on the keys that were moved, and on no fresh one."""
    rows, padded, device = kv.rows, pieces.padded, kv.rows.keys.device
    of_layer, count = len(pieces.start), kv.num_layers * len(pieces.start)
    tiles, fresh_tiles = triton.cdiv(pieces.longest, _TILE), triton.cdiv(padded, _TILE)
    wide = torch.float32
    sums = torch.empty((count, tiles, 2), dtype=wide, device=device)
    covariance = torch.empty((count, pieces.longest, padded), dtype=wide, device=device)
    among = torch.empty((count, padded, padded), dtype=wide, device=device)
    exact = "ieee" if weights.dtype == torch.float32 else "tf32"
    shape = {"HEADS": rows.num_heads, "DIM": rows.dim, "ALIGN": rows.alignment, "TILE": _TILE}
    launch(
        _sums_kernel,
        (count, tiles),
        pieces.start,
        pieces.length,
        rows.offsets,
        kv.distances,
        rows.keys,
        sums,
        rows.key_head_stride,
        of_layer,
        **shape,
        num_warps=4,
    )
    for among_fresh in (True, False):
        launch(
            _covariance_kernel,
            (count, fresh_tiles if among_fresh else tiles, fresh_tiles),
            pieces.start,
            pieces.length,
            pieces.first,
            pieces.count,
            pieces.fresh,
            rows.offsets,
            kv.distances,
            rows.keys,
            sums,
            covariance,
            among,
            passage,
            local,
            width,
            alike,
            reach,
            noise,
            rows.key_head_stride,
            pieces.longest,
            padded,
            tiles,
            of_layer,
            **shape,
            BLOCK_TILES=max(_FEWEST_BLOCK_TILES, triton.next_power_of_2(tiles)),
            PRECISION=exact,
            AMONG_FRESH=among_fresh,
            num_warps=4,
            # Loads ahead of their use were seen to give other products from run to run (Triton 3.6, H100).
            num_stages=1,
        )
    invert(among, pieces.count)
    launch(
        _weights_kernel,
        (count, tiles, fresh_tiles),
        pieces.length,
        pieces.count,
        covariance,
        among,
        weights,
        pieces.longest,
        padded,
        of_layer,
        TILE=_TILE,
        PANEL=PANEL,
        # The sums cancel: what tf32 leaves out would be seen.
        PRECISION="tf32x3" if device.type == "cuda" else "ieee",
        num_warps=4,
    )
