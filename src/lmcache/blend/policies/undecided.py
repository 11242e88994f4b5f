"""Where a policy has something to decide."""

from __future__ import annotations

import torch

from lmcache.blend.selection import SelectionContext


def undecided(context: SelectionContext) -> torch.Tensor:
    """bool ``[N]``: the rows that may be chosen or left, those of prompts with a ratio strictly between 0 and 1.

    When there are none, a policy need not look into the model at all.
    """
    rows = context.reusable & ~context.forced
    for (start, end), ratio in zip(context.prompts, context.ratios, strict=True):
        if not 0 < ratio < 1:
            rows[start:end] = False
    return rows


def computed_whole(context: SelectionContext) -> torch.Tensor:
    """bool ``[N]``: the forced rows, and all reusable ones of prompts with a ratio of 1."""
    ratios = [float(ratio == 1) for ratio in context.ratios]
    return context.choose(torch.zeros(context.num_rows), ratios=ratios)
