"""Shift the keys of a passage by what its recomputed tokens show on average."""

from __future__ import annotations

from lmcache.blend.correctors.interface import Corrector, LayerCorrection
from lmcache.blend.correctors.sampled_span import sampled_spans


class KeyShiftCorrector(Corrector):
    """Adds the mean of (fresh K − moved K) over the recomputed tokens of a passage to its other keys, layer by layer.

    Summed up in float32, rounded once. Values stay: shifting them makes the result worse.
    """

    name = "key_shift"

    def correct(self, layer: LayerCorrection) -> None:
        for span in sampled_spans(layer):
            shift = span.keys.change.mean(0)
            for tokens in span.blocks():
                span.keys.add(tokens, shift)
