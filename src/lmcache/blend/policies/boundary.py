"""The tokens at the seams between passages."""

from __future__ import annotations

import torch

from lmcache.blend.policies.near_edge import NearEdgePolicy, distance_from_ends
from lmcache.blend.selection import SelectionContext


class BoundaryPolicy(NearEdgePolicy):
    """Computes the first and the last ``w`` tokens of each moved passage. None: as many as the ratio pays for."""

    name = "boundary"
    option = "w"

    def __init__(self, w: int | None = None) -> None:
        super().__init__(w)

    def distance(self, context: SelectionContext) -> torch.Tensor:
        return distance_from_ends(context)
