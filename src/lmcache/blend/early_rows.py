"""Rows that are computed for good while a policy looks, before the rest is chosen."""

from __future__ import annotations

import torch

from lmcache.blend.layer_kv import LayerKV
from lmcache.blend.pieces import Piece


class EarlyRows:
    """Those among the rows that ``piece``, a later one, covers.

    A corrector has moved the others by them already. It is to do so once more by the rows of ``piece``, and is given
    the early ones too: where they stand nothing is left to move, so what later rows show beyond that counts only around
    these. The later ones alone, outliers for the most part, would move a whole passage that a fair sample has put right
    (docs/cacheblend.md, "In two steps").

    Attributes:
        rows: int64 ``[n]``, on the CPU, ascending: those of the piece and the early ones.
    """

    def __init__(self, piece: Piece, early: torch.Tensor) -> None:
        """``early``: bool ``[N]``, of the whole batch."""
        first, end = piece.covers
        before = first + torch.nonzero(early[first:end])[:, 0]
        self.rows = torch.cat([piece.rows, before]).sort().values
        self._at = torch.searchsorted(self.rows, piece.rows)

    def joined(self, layer: LayerKV, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of :attr:`rows`, ``[n, kv_heads, dim]``, where ``k`` and ``v`` are those of the piece."""
        return layer.held_among(self.rows, k, v, self._at)
