"""Compute everything: equals a full prefill, the upper anchor of every comparison."""

from __future__ import annotations

import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.selection import SelectionContext


class FullPolicy(SelectionPolicy):
    """Computes every row that is not exact, whatever the ratio is."""

    name = "full"

    def select(self, context: SelectionContext) -> torch.Tensor:
        return context.forced | context.reusable
