"""An even sample of every passage, and the tokens that the end of the prompt looks at."""

from __future__ import annotations

import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.policies.layer_choice import LayerChoice
from lmcache.blend.policies.query_attention import QueryAttentionPolicy
from lmcache.blend.selection import HeadReduction, SelectionContext


class SampledAttentionPolicy(SelectionPolicy):
    """Spends a part of the ratio's budget on evenly spaced tokens, the rest as :class:`QueryAttentionPolicy` does.

    Tokens that draw attention stand in clusters and are outliers, so by themselves they are a biased sample of how K
    and V of their passage change. A corrector goes by that sample; the evenly spaced tokens are what makes it fair.

    Args:
        share: of the reused tokens that are evenly spaced, 0 … 1; no more than the ratio.

    Other arguments are those of :class:`QueryAttentionPolicy`.
    """

    name = "sampled_attention"

    def __init__(
        self,
        share: float = 0.02,
        span: int = 8,
        layers: LayerChoice = "late",
        heads: HeadReduction = "mean",
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: must be above 0 and at most 1; for none take policy 'query_attention'")
        self._share = share
        self._attention = QueryAttentionPolicy(span, layers, heads)

    def select(self, context: SelectionContext) -> torch.Tensor:
        sample = context.choose(torch.zeros(context.num_rows), within=self._evenly_spaced(context))
        return context.choose(self._attention.scores(context), already=sample)

    def _evenly_spaced(self, context: SelectionContext) -> torch.Tensor:
        """bool ``[N]``: one token in the middle of every ``1 / share`` of a passage."""
        shares = torch.zeros(context.num_rows, dtype=torch.float64)
        for (start, end), ratio in zip(context.prompts, context.ratios, strict=True):
            shares[start:end] = min(self._share, ratio)
        spaced = torch.zeros(context.num_rows, dtype=torch.bool)
        for start, end in context.spans:
            until = torch.arange(end - start + 1) * shares[start] + 0.5
            spaced[start:end] = until[1:].floor() > until[:-1].floor()
        return spaced
