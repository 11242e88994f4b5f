"""``sink`` and ``query_attention`` together."""

from __future__ import annotations

import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.policies.layer_choice import LayerChoice
from lmcache.blend.policies.near_edge import distance_from_start
from lmcache.blend.policies.query_attention import QueryAttentionPolicy
from lmcache.blend.selection import HeadReduction, SelectionContext


class HybridPolicy(SelectionPolicy):
    """Computes the first ``k`` tokens of each moved passage, and spends the rest of the ratio's budget as
    :class:`QueryAttentionPolicy` does. A budget too small for all first tokens is spread over the passages.

    Other arguments are those of :class:`QueryAttentionPolicy`.
    """

    name = "hybrid"

    def __init__(self, k: int = 4, span: int = 8, layers: LayerChoice = None, heads: HeadReduction = "mean") -> None:
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1 token a passage; for none take policy 'query_attention'")
        self._k = k
        self._attention = QueryAttentionPolicy(span, layers, heads)

    def select(self, context: SelectionContext) -> torch.Tensor:
        distance = distance_from_start(context)
        first = context.choose(-distance, within=distance < self._k)
        return context.choose(self._attention.scores(context), already=first)
