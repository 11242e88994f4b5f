"""Reuse everything: the lower anchor of every comparison."""

from __future__ import annotations

import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.selection import SelectionContext


class NonePolicy(SelectionPolicy):
    """Computes only what must be computed, whatever the ratio is, 1 included."""

    name = "none"

    def select(self, context: SelectionContext) -> torch.Tensor:
        return context.forced.clone()
