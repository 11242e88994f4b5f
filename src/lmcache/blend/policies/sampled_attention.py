"""An even sample of every passage, and the tokens that the end of the prompt looks at."""

from __future__ import annotations

import numpy as np
import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.policies.layer_choice import LayerChoice
from lmcache.blend.policies.query_attention import QueryAttentionPolicy
from lmcache.blend.policies.undecided import undecided
from lmcache.blend.selection import HeadReduction, SelectionContext


class SampledAttentionPolicy(SelectionPolicy):
    """Spends a part of the ratio's budget on evenly spaced tokens, the rest as :class:`QueryAttentionPolicy` does.

    Tokens that draw attention stand in clusters and are outliers, so by themselves they are a biased sample of how K
    and V of their passage change. The evenly spaced tokens are a fair one. They are known beforehand, so they are
    computed together with the tokens that look, while KV is still on its way, and a corrector goes by them alone.

    Args:
        sample: the share of the budget that goes to evenly spaced tokens, above 0 and at most 1.
        at_most: of the reused tokens; what a larger ratio allows beyond goes to those that are looked at.

        layers: as there. Beyond the last of them tokens are chosen while the GPU still computes the sample.

    Other arguments are those of :class:`QueryAttentionPolicy`.
    """

    name = "sampled_attention"

    def __init__(
        self,
        sample: float = 0.5,
        at_most: float = 0.1,
        span: int = 8,
        layers: LayerChoice = (0.4, 0.8),
        heads: HeadReduction = "mean",
    ) -> None:
        for option, value in (("sample", sample), ("at_most", at_most)):
            if not 0 < value <= 1:
                raise ValueError(
                    f"{option}={value}: must be above 0 and at most 1; for none take policy 'query_attention'"
                )
        self._sample = sample
        self._at_most = at_most
        self._attention = QueryAttentionPolicy(span, layers, heads)

    def select(self, context: SelectionContext) -> torch.Tensor:
        sample = self._evenly_spaced(context)
        scores = self._attention.scores(context, sample if bool(sample.any()) else None)
        return context.choose(scores, already=sample)

    def _evenly_spaced(self, context: SelectionContext) -> torch.Tensor:
        """bool ``[N]``: in each prompt one in the middle of every so many tokens that may be chosen."""
        rows = undecided(context)
        for (start, end), ratio in zip(context.prompts, context.ratios, strict=True):
            of_prompt = rows.numpy()[start:end]  # half as long as with torch, while a GPU waits for it
            ordinal = np.cumsum(of_prompt, dtype=np.float64)  # from 1
            share = min(self._sample * ratio, self._at_most)
            of_prompt &= np.floor(ordinal * share + 0.5) > np.floor((ordinal - 1) * share + 0.5)
        return rows
