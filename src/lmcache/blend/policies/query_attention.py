"""The tokens that the end of the prompt looks at: the idea of ProphetKV."""

from __future__ import annotations

from typing import get_args

import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.policies.layer_choice import LayerChoice, check_layer_choice, chosen_layers
from lmcache.blend.policies.undecided import undecided
from lmcache.blend.selection import HeadReduction, SelectionContext


class QueryAttentionPolicy(SelectionPolicy):
    """Computes the tokens that receive most attention from the last ``span`` tokens of their prompt.

    Args:
        span: how many tokens look; the computed ones among them do.
        layers: whose attention counts. None: all; a list of numbers; two shares of the depth, as (0.4, 1.0); or "late",
            which is (0.6, 1.0).
        heads: the mean over heads, or the maximum.
    """

    name = "query_attention"

    def __init__(self, span: int = 8, layers: LayerChoice = None, heads: HeadReduction = "mean") -> None:
        if span < 1:
            raise ValueError(f"span={span}: at least one token of the prompt must look")
        if heads not in get_args(HeadReduction):
            raise ValueError(f"heads={heads!r}: must be one of {', '.join(get_args(HeadReduction))}")
        check_layer_choice(layers)
        self._span = span
        self._layers = layers
        self._heads = heads

    def select(self, context: SelectionContext) -> torch.Tensor:
        return context.choose(self.scores(context))

    def scores(self, context: SelectionContext, computed: torch.Tensor | None = None) -> torch.Tensor:
        """float32 ``[N]``; zeros, without a look into the model, where there is nothing to decide.

        ``computed``: see :meth:`SelectionContext.attention_received`.
        """
        layers = chosen_layers(self._layers, context.num_layers)
        if not bool(undecided(context).any()):
            return torch.zeros(context.num_rows)
        return context.attention_received(span=self._span, layers=layers, heads=self._heads, computed=computed)
