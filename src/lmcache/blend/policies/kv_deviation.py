"""The tokens whose fresh K or V differs most from the reused one: CacheBlend (arXiv:2405.16444)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

import numpy as np
import torch

from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.policies.layer_choice import check_in_model
from lmcache.blend.policies.undecided import computed_whole, undecided
from lmcache.blend.selection import DeviationTensor, SelectionContext


class KVDeviationPolicy(SelectionPolicy):
    """Computes all tokens up to the first check layer, and keeps on with those that deviate most there.

    With several check layers each one narrows down what the last one kept ("gradual filtering").

    Args:
        check_layers: ascending. Deviation at layer 0 is noise: K and V there depend on the token alone.
        tensor: what is compared: "k", "v", or "kv" for both.
        ratios: one a check layer, not rising. A prompt's own ratio is that of the last; they are scaled to it, and kept
            at 1 at most. So for one check layer they say nothing.
        thresholds: one a check layer, in place of the ratios: a token is kept when its deviation is above the
            threshold times the mean deviation of the tokens of its prompt that this check layer compares. A prompt's
            ratio then counts only if it is 0 (nothing is computed) or 1 (everything).
    """

    name = "kv_deviation"

    def __init__(
        self,
        check_layers: Sequence[int] = (1,),
        tensor: DeviationTensor = "v",
        ratios: Sequence[float] | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        if not check_layers or any(later <= layer for layer, later in pairwise(check_layers)):
            raise ValueError(f"check_layers={list(check_layers)}: name at least one layer, in ascending order")
        if tensor not in get_args(DeviationTensor):
            raise ValueError(f"tensor={tensor!r}: must be one of {', '.join(get_args(DeviationTensor))}")
        if thresholds is not None:
            _check_one_a_layer("thresholds", thresholds, check_layers)
            if min(thresholds) < 0:
                raise ValueError(f"thresholds={list(thresholds)}: must not be negative, their unit is the mean")
        elif ratios is None and len(check_layers) > 1:
            raise ValueError(f"check_layers={list(check_layers)}: several of them need ratios, as (0.3, 0.15)")
        self._check_layers = tuple(check_layers)
        self._tensor = tensor
        self._thresholds = None if thresholds is None else tuple(thresholds)
        self._widths = [1.0] * len(check_layers) if ratios is None else _widths(ratios, check_layers)

    def select(self, context: SelectionContext) -> torch.Tensor:
        check_in_model("check_layers", self._check_layers, context.num_layers)
        open_rows = undecided(context)
        kept = context.forced | open_rows
        if bool(open_rows.any()):
            for stage, layer in enumerate(self._check_layers):
                deviation = context.deviation(layer, self._tensor, kept)
                if self._thresholds is None:
                    ratios = [self._stage_ratio(stage, ratio) for ratio in context.ratios]
                    kept = context.choose(deviation, ratios=ratios, within=kept)
                else:
                    kept = _above(context, deviation, self._thresholds[stage], kept)
        return kept | computed_whole(context)

    def ratio_for(self, charged_budget: float, num_layers: int) -> float:
        """With thresholds what is charged depends on the prompt; only the sign means something then."""
        check_in_model("check_layers", self._check_layers, num_layers)
        least = self._charged(0, num_layers)
        if charged_budget < least:
            return charged_budget - least
        # What is charged is linear in the ratio but for bends where a stage comes to keep everything.
        bends = [0.0, *(1 / width for width in self._widths)]
        return float(np.interp(charged_budget, [self._charged(ratio, num_layers) for ratio in bends], bends))

    def _charged(self, ratio: float, num_layers: int) -> float:
        """The share of (reused token, layer) pairs that is computed at a ratio: all up to the first check layer, then
        what each stage keeps up to the next."""
        charged = self._check_layers[0] + 1.0
        for stage, (layer, following) in enumerate(pairwise((*self._check_layers, num_layers - 1))):
            charged += self._stage_ratio(stage, ratio) * (following - layer)
        return charged / num_layers

    def _stage_ratio(self, stage: int, ratio: float) -> float:
        return min(1.0, ratio * self._widths[stage])


def _widths(ratios: Sequence[float], check_layers: Sequence[int]) -> list[float]:
    """The ratios in units of the last one, which a prompt's own takes the place of."""
    _check_one_a_layer("ratios", ratios, check_layers)
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"ratios={list(ratios)}: each must be 0 … 1")
    if any(later > ratio for ratio, later in pairwise(ratios)):
        raise ValueError(f"ratios={list(ratios)}: must not rise, each layer chooses among the tokens of the last")
    if len(ratios) == 1:
        return [1.0]
    if ratios[-1] == 0:
        raise ValueError(f"ratios={list(ratios)}: the last must be above 0; to recompute nothing take policy 'none'")
    return [ratio / ratios[-1] for ratio in ratios]


def _check_one_a_layer(option: str, given: Sequence[float], check_layers: Sequence[int]) -> None:
    if len(given) != len(check_layers):
        raise ValueError(f"{option}={list(given)}: give one for each of check_layers={list(check_layers)}")


def _above(context: SelectionContext, deviation: torch.Tensor, threshold: float, rows: torch.Tensor) -> torch.Tensor:
    """The forced rows and those of ``rows`` (bool ``[N]``) that deviate more than ``threshold`` times the mean."""
    kept = context.forced.clone()
    compared = rows & context.reusable & ~context.forced
    for start, end in context.prompts:
        at = compared[start:end]
        part = deviation[start:end]
        kept[start:end] |= at & (part > threshold * part[at].mean())
    return kept
