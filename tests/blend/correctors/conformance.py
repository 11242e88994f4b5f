"""What every corrector must do. A corrector's test class inherits this and says how to make it.

The property test over all of them stands in test_correctors.py: hypothesis wants one function, not one a class.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from lmcache.blend.correctors import corrector_names, make_corrector
from lmcache.blend.correctors.interface import Corrector, LayerCorrection
from tests.blend.correctors.layers import Prompt, layer_of

MIXED = Prompt(60, ((5, 25), (25, 26), (30, 45), (45, 50)), (0, 1, 6, 9, 20, 25, 31, 32, 44, 55, 59))
OTHER = Prompt(33, ((0, 30),), (3, 7, 8, 30, 32), seed=1)
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
# Half the distance of two neighbours, relative; the sums before that one rounding add as much again in float32.
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-21, torch.float64: 2**-48}


class CorrectorConformance:
    corrector_name: ClassVar[str]
    options: ClassVar[dict[str, object]] = {}

    @classmethod
    def make(cls) -> Corrector:
        return make_corrector(cls.corrector_name, **cls.options)

    @classmethod
    def reference(cls, layer: LayerCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values after correction, float64; what it says of recomputed rows does not matter."""
        raise NotImplementedError

    @classmethod
    def corrected(cls, layer: LayerCorrection) -> LayerCorrection:
        """``layer`` stays as it is."""
        layer = replace(layer, keys=layer.keys.clone(), values=layer.values.clone())
        cls.make().correct(layer)
        return layer

    @classmethod
    def check(cls, *prompts: Prompt, dtype: torch.dtype = torch.float32) -> None:
        """Whatever the batch."""
        before = layer_of(*prompts, dtype=dtype)
        after = cls.corrected(before)
        again = cls.corrected(before)
        for name, reference in zip(("keys", "values"), cls.reference(before), strict=True):
            old, new = getattr(before, name), getattr(after, name)
            assert new.dtype == dtype
            assert bool(new.isfinite().all())
            assert torch.equal(getattr(again, name), new), "not deterministic"
            may_change = torch.zeros(len(new), dtype=torch.bool)
            for start, end in before.spans:
                may_change[start:end] = bool(((before.rows >= start) & (before.rows < end)).any())
            assert torch.equal(old[~may_change], new[~may_change]), "changed outside of spans with a recomputed row"
            kept = may_change.clone()
            kept[before.rows] = False
            bound = ROUNDING[dtype] * reference[kept].abs().amax() if bool(kept.any()) else 0.0
            assert bool(((new[kept].double() - reference[kept]).abs() <= bound).all())
        assert torch.equal(layer_of(*prompts, dtype=dtype).fresh_keys, before.fresh_keys)
        assert torch.equal(layer_of(*prompts, dtype=dtype).fresh_values, before.fresh_values)

    def test_name(self) -> None:
        assert self.make().name == self.corrector_name
        assert self.corrector_name in corrector_names()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_against_the_reference(self, dtype: torch.dtype) -> None:
        self.check(MIXED, dtype=dtype)
        self.check(MIXED, OTHER, dtype=dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_prompt_is_corrected_in_a_batch_as_it_is_alone(self, dtype: torch.dtype) -> None:
        together = self.corrected(layer_of(MIXED, OTHER, dtype=dtype))
        for name in ("keys", "values"):
            alone = [getattr(self.corrected(layer_of(prompt, dtype=dtype)), name) for prompt in (MIXED, OTHER)]
            assert torch.equal(getattr(together, name), torch.cat(alone))

    def test_nothing_is_recomputed(self) -> None:
        self.check(Prompt(20, ((2, 10), (10, 18)), ()))

    def test_everything_is_recomputed(self) -> None:
        self.check(Prompt(10, ((0, 10),), tuple(range(10))))

    def test_a_long_passage_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lmcache.blend.correctors.sampled_span._BLOCK", 7)
        self.check(Prompt(40, ((3, 38),), (3, 10, 11, 30)))

    def test_no_spans(self) -> None:
        self.check(Prompt(10, (), (0, 4, 9)))

    def test_spans_of_one_row(self) -> None:
        self.check(Prompt(4, ((0, 1), (1, 2), (2, 3)), (1, 3)))

    def test_what_did_not_change_is_left_as_it_is(self) -> None:
        layer = layer_of(MIXED)
        same = replace(layer, fresh_keys=layer.keys[layer.rows].clone(), fresh_values=layer.values[layer.rows].clone())
        after = self.corrected(same)
        assert torch.equal(after.keys, layer.keys)
        assert torch.equal(after.values, layer.values)
