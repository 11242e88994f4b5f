"""A policy as another distribution would bring it."""

from __future__ import annotations

import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.selection import SelectionContext


class LastTokensPolicy(SelectionPolicy):
    name = "last_tokens"

    def select(self, context: SelectionContext) -> torch.Tensor:
        return context.choose(torch.arange(context.num_rows))


class NoPolicy:
    name = "no_policy"
