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


def shifted(layer: LayerCorrection, name: str, weight: Callable[[int], float]) -> torch.Tensor:
    """Each key or value plus the mean change of its span, weighted by distance; one row at a time, in float64."""
    moved, computed = getattr(layer, name).double().clone(), getattr(layer, f"fresh_{name}").double()
    rows = layer.rows.tolist()
    for start, end in layer.spans:
        fresh = [index for index, row in enumerate(rows) if start <= row < end]
        changes = {rows[index]: computed[index] - moved[rows[index]] for index in fresh}
        for row in range(start, end) if changes else ():
            weights = {other: weight(other - row) for other in changes}
            for other, change in changes.items():
                moved[row] += change * weights[other] / sum(weights.values())
    return moved


def gaussian(distance: int) -> float:
    return math.exp(-((distance / 3) ** 2) / 2) + 0.05


class TestNone(CorrectorConformance):
    corrector_name = "none"

    @classmethod
    def reference(cls, layer: LayerCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.keys.double(), layer.values.double()


class TestKeyShift(CorrectorConformance):
    corrector_name = "key_shift"

    @classmethod
    def reference(cls, layer: LayerCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        return shifted(layer, "keys", lambda distance: 1.0), layer.values.double()


class TestLocalKeyShift(CorrectorConformance):
    corrector_name = "local_key_shift"
    options: ClassVar = {"width": 3.0, "everywhere": 0.05}

    @classmethod
    def reference(cls, layer: LayerCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        return shifted(layer, "keys", gaussian), layer.values.double()

    def test_very_wide_is_the_plain_mean(self) -> None:
        prompt = Prompt(30, ((2, 28),), (3, 10, 11, 20))
        wide, plain = layer_of(prompt), layer_of(prompt)
        make_corrector("local_key_shift", width=1e6).correct(wide)
        make_corrector("key_shift").correct(plain)
        torch.testing.assert_close(wide.keys, plain.keys)


class TestKriging(CorrectorConformance):
    corrector_name = "kriging"

    @classmethod
    def reference(cls, layer: LayerCorrection) -> tuple[torch.Tensor, torch.Tensor]:
        """The conditional mean of a joint normal, solved with the whole matrix, in float64."""
        keys, values = layer.keys.double().clone(), layer.values.double().clone()
        rows = layer.rows.tolist()
        for start, end in layer.spans:
            fresh = [index for index, row in enumerate(rows) if start <= row < end]
            if not fresh:
                continue
            known = [rows[index] - start for index in fresh]
            x = layer.keys[start:end].double().flatten(1)
            place = torch.arange(end - start, dtype=torch.float64)
            covariance = 2 + 0.3 * torch.exp(-(((place[:, None] - place) / 8) ** 2) / 2)
            apart = ((x[:, None] - x) ** 2).mean(2)
            covariance += torch.exp(-apart / (0.5 * x.var(correction=0)))
            among = covariance[known][:, known] + torch.eye(len(known), dtype=torch.float64)
            weights = covariance[:, known] @ torch.linalg.inv(among)
            for moved, before, computed in (
                (keys, layer.keys, layer.fresh_keys),
                (values, layer.values, layer.fresh_values),
            ):
                change = computed[fresh].double() - before[[start + at for at in known]].double()
                moved[start:end] += (weights @ change.flatten(1)).view(-1, *moved.shape[1:])
        return keys, values

    def test_a_long_passage_is_corrected_in_pieces(self) -> None:
        """Tokens of another piece do not count, so that the cost of a token does not grow with the passage."""
        layer = layer_of(Prompt(1500, ((0, 1500),), (10, 1400)))
        first = layer_of(Prompt(1500, ((0, 750), (750, 1500)), (10, 1400)))
        make_corrector("kriging").correct(layer)
        make_corrector("kriging").correct(first)
        assert torch.equal(layer.keys, first.keys)

    def test_a_cluster_of_outliers_counts_little_more_than_one_of_them(self) -> None:
        """Nine outliers side by side and one fair token: far from both, a mean would be nine tenths outliers."""
        layer = layer_of(Prompt(101, ((0, 100),), (0, 1, 2, 3, 4, 5, 6, 7, 8, 92)))
        layer.values.zero_()
        layer.fresh_values.fill_(0)
        layer.fresh_values[:9] = 1
        make_corrector("kriging", passage=0.01, local=1.0, width=20.0, alike=0.0, noise=0.1).correct(layer)
        assert 0.0 < float(layer.values[30, 0, 0]) < 0.5
        assert float(layer.values[3, 0, 0]) > 0.9
        assert float(layer.values[92, 0, 0]) < 0.1


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
    assert list(CORRECTORS.builtin) == ["none", "key_shift", "local_key_shift", "kriging"]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"corrector 'shift': must be one of none, key_shift, .*negate"):
        make_corrector("shift")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("key_shift", {"width": 3}, "'key_shift' with {'width': 3}: .*its options: none"),
        ("local_key_shift", {"width": 0}, "width=0: must be a positive number of tokens"),
        ("local_key_shift", {"everywhere": 0.0}, "everywhere=0.0: must be positive"),
        ("kriging", {"noise": 0.0}, "noise=0.0: must be positive"),
        ("kriging", {"alike": -1.0}, "alike=-1.0: must not be negative"),
    ],
)
def test_bad_options_are_refused_in_words(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_corrector(name, **options)
