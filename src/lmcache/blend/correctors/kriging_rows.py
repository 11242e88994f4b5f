"""Kriging of many passages at a time, for an accelerator: what
:class:`lmcache.blend.correctors.kriging.KrigingCorrector` does one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from lmcache.blend.correctors.interface import RowCorrection, RowsAhead
from lmcache.blend.correctors.sampled_span import PieceLimits, cut_spans
from lmcache.kernels.availability import kernels_for

if TYPE_CHECKING:
    from lmcache.blend.correctors.kriging_kernels import KernelKriging
    from lmcache.kernels.kv_rows import KVRows

# Elements of the largest matrix of a batch: 128 MiB in float32.
_MAX_ELEMENTS = 2**25


@dataclass(frozen=True)
class Covariance:
    """See :class:`lmcache.blend.correctors.kriging.KrigingCorrector`."""

    passage: float
    local: float
    width: float
    alike: float
    reach: float
    noise: float


class Piece(NamedTuple):
    """Rows ``start …`` of the batch, of which ``num_fresh`` are fresh: ``first …`` of the fresh ones."""

    start: int
    num_rows: int
    first: int
    num_fresh: int


class PieceBatch:
    """Pieces of passages side by side: ``S`` of at most ``n`` rows, of which at most ``m`` are fresh.

    ``tokens`` (int32 ``[S, n]``) are rows of the batch, ``fresh`` (int64 ``[S, m]``) counts a piece's own rows,
    ``computed`` (int64 ``[S, m]``) counts the fresh tensors. Where a piece is shorter, ``tokens`` are −1 and
    ``is_fresh`` (bool ``[S, m]``) is False.
    """

    def __init__(self, pieces: Sequence[Piece], fresh_rows: torch.Tensor, device: torch.device) -> None:
        """``fresh_rows``: int64 ``[m]``, on the CPU, all of the batch."""
        rows = max(piece.num_rows for piece in pieces)
        most = max(piece.num_fresh for piece in pieces)
        tokens = torch.full((len(pieces), rows), -1, dtype=torch.int32)
        fresh = torch.zeros((len(pieces), most), dtype=torch.int64)
        computed = torch.zeros((len(pieces), most), dtype=torch.int64)
        is_fresh = torch.zeros((len(pieces), most), dtype=torch.bool)
        for index, piece in enumerate(pieces):
            tokens[index, : piece.num_rows] = torch.arange(piece.start, piece.start + piece.num_rows)
            own = fresh_rows[piece.first : piece.first + piece.num_fresh] - piece.start
            fresh[index, : piece.num_fresh] = own
            computed[index, : piece.num_fresh] = torch.arange(piece.first, piece.first + piece.num_fresh)
            is_fresh[index, : piece.num_fresh] = True
        self.tokens, self.fresh = tokens.to(device), fresh.to(device)
        self.computed, self.is_fresh = computed.to(device), is_fresh.to(device)
        self.num_rows = torch.tensor([piece.num_rows for piece in pieces], device=device, dtype=torch.float32)

    @cached_property
    def weight(self) -> torch.Tensor:
        """float32 ``[S, m]``: 1 for a fresh row, 0 for none."""
        return self.is_fresh.to(torch.float32)

    def nearness(self, of: Covariance) -> torch.Tensor:
        """The part of the covariance that hangs on where tokens stand, ``[S, n, m]``, zero where there is no row."""
        at = torch.arange(self.tokens.shape[1], device=self.tokens.device, dtype=torch.float32)
        distances = at[None, :, None] - self.fresh[:, None, :]
        exponent = (-(distances / of.width).square() / 2).clamp_min_(-80)
        return exponent.exp_().mul_(of.local).add_(of.passage).mul_(self.weight[:, None])


def preparation(ahead: RowsAhead, of: Covariance, limits: PieceLimits) -> Callable[[int], None] | None:
    """What :func:`correct_pieces` needs of moved KV alone."""
    for way in _ways(ahead, ahead.kv, limits, of):
        if not isinstance(way, _ByTorch):
            way.look_ahead(ahead)
            return way.get_ready
    return None


def correct_pieces(layer: RowCorrection, of: Covariance, limits: PieceLimits) -> None:
    """Shift what is not fresh of every span; a span beyond ``limits`` is cut."""
    for way in _ways(layer, layer.kv.kernel_rows, limits, of):
        way.correct(layer)


def _ways(
    layer: RowCorrection | RowsAhead, kv: KVRows, limits: PieceLimits, of: Covariance
) -> list[KernelKriging | _ByTorch]:
    key = ("kriging", layer.spans, of)
    ways: list[KernelKriging | _ByTorch] | None = layer.memo.get(key)
    if ways is None:
        ways = layer.memo[key] = _made(layer.spans, layer.rows, kv, limits, of)
    return ways


def _made(
    spans: Sequence[tuple[int, int]], rows: torch.Tensor, kv: KVRows, limits: PieceLimits, of: Covariance
) -> list[KernelKriging | _ByTorch]:
    pieces = [
        Piece(start, end - start, first, last - first) for start, end, first, last in cut_spans(spans, rows, limits)
    ]
    device = kv.keys.device
    if not kernels_for(device):
        return [_ByTorch(pieces, rows, device, of)]
    from lmcache.blend.correctors.kriging_kernels import KernelKriging
    from lmcache.kernels.kriging import can_krige

    small = [piece for piece in pieces if can_krige(kv, piece.num_fresh)]
    large = [piece for piece in pieces if not can_krige(kv, piece.num_fresh)]
    ways: list[KernelKriging | _ByTorch] = []
    if small:
        # Only room is lost where one is shorter.
        ways.append(KernelKriging(batches(small, alike=False), rows, len(kv.offsets), device, of))
    if large:
        ways.append(_ByTorch(large, rows, device, of))
    return ways


class _ByTorch:
    def __init__(self, pieces: list[Piece], rows: torch.Tensor, device: torch.device, of: Covariance) -> None:
        made = [PieceBatch(batch, rows, device) for batch in batches(pieces, alike=True)]
        self._batches = [(batch, batch.nearness(of)) for batch in made]
        self._of = of

    def correct(self, layer: RowCorrection) -> None:
        for batch, nearness in self._batches:
            _correct(layer, batch, nearness, self._of)


def _correct(layer: RowCorrection, batch: PieceBatch, nearness: torch.Tensor, of: Covariance) -> None:
    count, rows = batch.tokens.shape
    keys, values = (x.view(count, rows, -1) for x in layer.kv.read(batch.tokens.flatten()))
    width = keys.shape[2]
    picked = batch.fresh[:, :, None].expand(-1, -1, width)
    fresh_keys = keys.gather(1, picked)
    covariance = _covariance(keys, fresh_keys, batch, nearness, of)
    among = covariance.gather(1, batch.fresh[:, :, None].expand(-1, -1, covariance.shape[2]))
    among = among * batch.weight[:, :, None]
    among.diagonal(dim1=1, dim2=2).add_(of.noise)
    weights = torch.bmm(covariance, _inverse(among))  # [S, n, m]
    shape = layer.fresh_keys.shape[1:]
    shifts = []
    for held, at_fresh, fresh in (
        (keys, fresh_keys, layer.fresh_keys),
        (values, values.gather(1, picked), layer.fresh_values),
    ):
        change = fresh[batch.computed].flatten(2).float() - at_fresh.float()
        change *= batch.weight[:, :, None]
        # Rounding the shift as the KV itself is rounded costs less than the noise that it is an estimate from.
        shifts.append(torch.bmm(weights.to(held.dtype), change.to(held.dtype)).view(count * rows, *shape))
    layer.kv.add(batch.tokens.flatten(), *shifts)


def _covariance(
    keys: torch.Tensor, fresh_keys: torch.Tensor, batch: PieceBatch, nearness: torch.Tensor, of: Covariance
) -> torch.Tensor:
    """``[S, n, m]``, of every row with the fresh ones; without noise. Zero where there is no fresh one."""
    if not of.alike:
        return nearness
    width = keys.shape[2]
    elements = batch.num_rows * width
    squares = torch.linalg.vector_norm(keys, dim=2, dtype=torch.float32).square()
    mean = keys.sum((1, 2), dtype=torch.float32) / elements
    variance = squares.sum(1) / elements - mean.square()
    unit = (of.reach * variance).clamp_min(1e-30)[:, None]
    apart = squares / (width * unit)
    products = _float_products(keys, fresh_keys)
    products.mul_((2 / (width * unit))[:, :, None]).sub_(apart[:, :, None])
    products.sub_(apart.gather(1, batch.fresh)[:, None]).clamp_max_(0.0).exp_()
    return products.mul_((of.alike * batch.weight)[:, None]).add_(nearness)


def _float_products(keys: torch.Tensor, fresh_keys: torch.Tensor) -> torch.Tensor:
    """Each row by each fresh one, summed up in float32."""
    if keys.dtype == torch.float32 or keys.device.type != "cuda":
        return torch.bmm(keys.float(), fresh_keys.float().transpose(1, 2))
    return torch.bmm(keys, fresh_keys.transpose(1, 2), out_dtype=torch.float32)


def _inverse(matrices: torch.Tensor) -> torch.Tensor:
    """Of positive definite ones, ``[S, m, m]``. Positive noise makes them that: nothing need be checked, and an
    accelerator not be waited for."""
    factor, _ = torch.linalg.cholesky_ex(matrices)
    identity = torch.eye(matrices.shape[1], device=matrices.device, dtype=matrices.dtype).expand_as(matrices)
    rest = torch.linalg.solve_triangular(factor, identity, upper=False)
    return torch.bmm(rest.transpose(1, 2), rest)


def batches(pieces: list[Piece], *, alike: bool) -> Iterator[list[Piece]]:
    """Few batches, with ``alike`` of pieces of like size."""
    batch: list[Piece] = []
    rows = most = 0
    for piece in sorted(pieces, key=lambda piece: (piece.num_rows, piece.num_fresh), reverse=True):
        wider = max(most, piece.num_fresh)
        too_small = alike and piece.num_rows < rows / 2
        if batch and ((len(batch) + 1) * rows * wider > _MAX_ELEMENTS or too_small):
            yield batch
            batch, wider = [], piece.num_fresh
        if not batch:
            rows = piece.num_rows
        batch.append(piece)
        most = wider
    if batch:
        yield batch
