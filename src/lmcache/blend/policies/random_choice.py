"""Tokens drawn by lot: what a policy must beat."""

from __future__ import annotations

import numpy as np
import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.selection import SelectionContext


class RandomPolicy(SelectionPolicy):
    """A prompt's tokens are drawn from ``context.seed`` alone, whatever else is in the batch.

    The draws are the raw stream of Philox, which numpy promises never to change. So every rank, platform and version
    draws the same tokens; ``torch.Generator`` promises that for none of them.
    """

    name = "random"

    def select(self, context: SelectionContext) -> torch.Tensor:
        scores = torch.zeros(context.num_rows, dtype=torch.int64)
        for start, end in context.prompts:
            raw = np.random.Philox(key=context.seed % 2**64).random_raw(end - start)
            scores[start:end] = torch.from_numpy(raw.view(np.int64))
        return context.choose(scores)
