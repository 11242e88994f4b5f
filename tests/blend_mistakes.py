"""Two mistakes that a blend could make unseen. Tests make them on purpose, to show that a comparison would see them."""

from __future__ import annotations

from typing import Any

import torch

from lmcache.blend.attention import QueryMask
from lmcache.blend.rope import FusedRope, Positions

UNROTATED, BOTTOM_RIGHT = "keys not re-rotated", "bottom-right mask"
_made = QueryMask.__init__


def unrotated(
    self: FusedRope, old_positions: Positions, new_positions: Positions, k: torch.Tensor, **lengths: Any
) -> torch.Tensor:
    """For :meth:`FusedRope.fused_encode`: keys stay as they were where the passage stood before."""
    return k


def bottom_right(
    self: QueryMask,
    positions: torch.Tensor,
    sliding_window: int | None = None,
    known: torch.Tensor | None = None,
    on_host: torch.Tensor | None = None,
) -> None:
    """For :meth:`QueryMask.__init__`: the mask of a kernel that takes the rows for the last ones of the prompt."""
    last = int(positions[-1])
    _made(self, torch.arange(last + 1 - len(positions), last + 1), sliding_window, known)
