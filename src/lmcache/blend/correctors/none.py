"""Leave what is not recomputed as it is."""

from __future__ import annotations

from lmcache.blend.correctors.interface import Corrector, LayerCorrection


class NoneCorrector(Corrector):
    name = "none"

    def correct(self, layer: LayerCorrection) -> None:
        pass
