from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.blend.correctors import CORRECTORS, corrector_names, make_corrector
from lmcache.blend.correctors.interface import Corrector, LayerCorrection
from tests.blend.correctors.conformance import DTYPES, CorrectorConformance
from tests.blend.correctors.layers import Prompt, batches, layer_of


class NegateCorrector(Corrector):
    """As another distribution would bring it: spans with a recomputed token change their sign."""

    name = "negate"

    def correct(self, layer: LayerCorrection) -> None:
        for start, end in layer.spans:
            inside = (layer.rows >= start) & (layer.rows < end)
            if bool((layer.fresh_values[inside] != layer.values[layer.rows[inside]]).any()):
                layer.values[start:end] *= -1


@pytest.fixture(autouse=True, scope="module")
def installed() -> Iterator[None]:
    point = EntryPoint("negate", f"{__name__}:NegateCorrector", "lmcache.blend_correctors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lmcache.blend.plugins.entry_points", lambda group: [point] if group == "lmcache.blend_correctors" else []
        )
        yield


def shifted_keys(layer: LayerCorrection, weight: Callable[[int], float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each key plus the mean change of its span, weighted by distance; one row at a time, in float64."""
    keys = layer.keys.double().clone()
    rows = layer.rows.tolist()
    for start, end in layer.spans:
        fresh = [index for index, row in enumerate(rows) if start <= row < end]
        changes = {rows[index]: layer.fresh_keys[index].double() - layer.keys[rows[index]].double() for index in fresh}
        for row in range(start, end) if changes else ():
            weights = {other: weight(other - row) for other in changes}
            for other, change in changes.items():
                keys[row] += change * weights[other] / sum(weights.values())
    return keys, layer.values.double()


class TestNone(CorrectorConformance):
    corrector_name = "none"

    @classmethod
    def reference(cls, layer: LayerCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.keys.double(), layer.values.double()


class TestKeyShift(CorrectorConformance):
    corrector_name = "key_shift"

    @classmethod
    def reference(cls, layer: LayerCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        return shifted_keys(layer, lambda distance: 1.0)


class TestLocalKeyShift(CorrectorConformance):
    corrector_name = "local_key_shift"
    options: ClassVar = {"width": 3.0, "everywhere": 0.05}

    @classmethod
    def reference(cls, layer: LayerCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        return shifted_keys(layer, lambda distance: math.exp(-((distance / 3) ** 2) / 2) + 0.05)

    def test_very_wide_is_the_plain_mean(self) -> None:
        prompt = Prompt(30, ((2, 28),), (3, 10, 11, 20))
        wide, plain = layer_of(prompt), layer_of(prompt)
        make_corrector("local_key_shift", width=1e6).correct(wide)
        make_corrector("key_shift").correct(plain)
        torch.testing.assert_close(wide.keys, plain.keys)


class TestNegate(CorrectorConformance):
    """Of another distribution."""

    corrector_name = "negate"

    @classmethod
    def reference(cls, layer: LayerCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.keys.double(), -layer.values.double()


@pytest.mark.parametrize("case", CorrectorConformance.__subclasses__())
@settings(max_examples=60, deadline=None)
@given(batch=batches(), dtype=st.sampled_from(DTYPES))
def test_any_batch(case: type[CorrectorConformance], batch: list[Prompt], dtype: torch.dtype) -> None:
    case.check(*batch, dtype=dtype)


def test_every_corrector_is_tested() -> None:
    assert {case.corrector_name for case in CorrectorConformance.__subclasses__()} == set(corrector_names())


def test_the_names() -> None:
    assert list(CORRECTORS.builtin) == ["none", "key_shift", "local_key_shift"]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"corrector 'shift': must be one of none, key_shift, .*negate"):
        make_corrector("shift")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("key_shift", {"width": 3}, "'key_shift' with {'width': 3}: .*its options: none"),
        ("local_key_shift", {"width": 0}, "width=0: must be a positive number of tokens"),
        ("local_key_shift", {"everywhere": 0.0}, "everywhere=0.0: must be positive"),
    ],
)
def test_bad_options_are_refused_in_words(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_corrector(name, **options)
