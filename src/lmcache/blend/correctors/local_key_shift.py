"""Shift each key by what the recomputed tokens near it show."""

from __future__ import annotations

import torch

from lmcache.blend.correctors.interface import Corrector, LayerCorrection
from lmcache.blend.correctors.sampled_span import sampled_spans


class LocalKeyShiftCorrector(Corrector):
    """As :class:`lmcache.blend.correctors.key_shift.KeyShiftCorrector`, with a mean that is weighted by distance.

    A recomputed token at distance ``d`` in the same passage has the weight ``exp(−(d / width)² / 2) + everywhere``.

    Args:
        width: in tokens.
        everywhere: what a token far away counts, against 1 for one close by. Without it a token far from all recomputed
            ones would have nothing to go by.
    """

    name = "local_key_shift"

    def __init__(self, width: float = 16.0, everywhere: float = 0.02) -> None:
        if not width > 0:
            raise ValueError(f"width={width}: must be a positive number of tokens")
        if not everywhere > 0:
            raise ValueError(f"everywhere={everywhere}: must be positive; a small one, as 0.02, keeps the shift local")
        self._width = width
        self._everywhere = everywhere

    def correct(self, layer: LayerCorrection) -> None:
        for span in sampled_spans(layer):
            for tokens in span.blocks():
                weights = torch.exp(-(span.distances(tokens) / self._width).square() / 2) + self._everywhere
                span.keys.add(tokens, weights / weights.sum(1, keepdim=True) @ span.keys.change)
