"""Leave what is not recomputed as it is."""

from __future__ import annotations

from lmcache.blend.correctors.interface import BatchedCorrector, LayerCorrection, RowCorrection


class NoneCorrector(BatchedCorrector):
    name = "none"
    alike_in_layers = True

    def correct(self, layer: LayerCorrection) -> None:
        pass

    def correct_rows(self, layer: RowCorrection) -> None:
        pass
