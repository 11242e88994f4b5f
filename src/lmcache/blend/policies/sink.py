"""The first tokens of each passage: EPIC's LegoLink (arXiv:2410.15332)."""

from __future__ import annotations

import torch

from lmcache.blend.policies.near_edge import NearEdgePolicy, distance_from_start
from lmcache.blend.selection import SelectionContext


class SinkPolicy(NearEdgePolicy):
    """Computes the first ``k`` tokens of each moved passage: there a passage that was cached alone keeps an attention
    sink of its own. None: as many as the ratio pays for."""

    name = "sink"
    option = "k"

    def __init__(self, k: int | None = None) -> None:
        super().__init__(k)

    def distance(self, context: SelectionContext) -> torch.Tensor:
        return distance_from_start(context)
