"""Kriging by kernels, by torch for many passages, and passage by passage: the same shifts."""

from __future__ import annotations

import pytest
import torch

from lmcache.blend.correctors import kriging_rows
from lmcache.blend.correctors.interface import LayerCorrection, RowCorrection
from lmcache.blend.correctors.kriging import KrigingCorrector
from lmcache.blend.correctors.sampled_span import PieceLimits
from tests.kernels.fp8_numbers import real, rounded
from tests.kernels.needs_triton import DEVICE, FP8, require

require()

from lmcache.kernels.kriging_shift import changes_of  # noqa: E402 - needs Triton
from lmcache.kernels.kv_read import read  # noqa: E402
from lmcache.kernels.kv_rows import KVRows  # noqa: E402
from lmcache.kernels.kv_write import write  # noqa: E402


class Rows:
    def __init__(self, keys: torch.Tensor, values: torch.Tensor, *scales: torch.Tensor) -> None:
        self.kernel_rows = KVRows.of_tensors(keys, values).at(keys, values, *scales)

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return read(self.kernel_rows, rows)

    def add(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        write(keys, values, rows, self.kernel_rows, add=True)


@pytest.mark.parametrize("alike", [1.0, 0.0])
@pytest.mark.parametrize("longest", [1024, 50])
@pytest.mark.parametrize("share", [0.02, 0.25, 1.0])
def test_one_by_one_and_together(alike: float, longest: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.blend.correctors.kriging._LIMITS", PieceLimits(longest, longest // 2))
    torch.manual_seed(0)
    spans = ((0, 130), (135, 150), (160, 300))
    keys, values = torch.randn(2, 300, 2, 16, device=DEVICE)
    rows = torch.randperm(300)[: int(300 * share)].sort().values
    fresh_keys, fresh_values = torch.randn(2, len(rows), 2, 16, device=DEVICE)
    corrector = KrigingCorrector(alike=alike)
    expected = keys.clone(), values.clone()
    corrector.correct(
        LayerCorrection(
            0, *expected, rows.to(DEVICE), fresh_keys, fresh_values, spans, torch.arange(300, device=DEVICE), None
        )
    )
    kept = torch.ones(300, dtype=torch.bool)
    kept[rows] = False
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(kriging_rows, "kernels_for", lambda _: False)
        ours = keys.clone(), values.clone()
        corrector.correct_rows(RowCorrection(0, Rows(*ours), rows, fresh_keys, fresh_values, spans, {}))
        for name, theirs, got, before in zip("KV", expected, ours, (keys, values), strict=True):
            torch.testing.assert_close(got[kept], theirs[kept], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
            assert share == 1.0 or not torch.equal(got[kept], before[kept])


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_values_anywhere_behind_their_keys(behind: int) -> None:
    """K and V are shifted by one launch, which is told how far they are apart."""
    torch.manual_seed(0)
    rows, held = torch.arange(0, 100, 7), torch.randn(2 * 3200 + behind, device=DEVICE)
    fresh = torch.randn(len(rows), 2, 48, device=DEVICE)
    ours = held[:3200].view(100, 2, 16), held[3200 + behind :].view(100, 2, 16)
    apart = tuple(x.clone() for x in ours)
    for held_in, computed in (
        (ours, (fresh[..., :16], fresh[..., 31:47])),
        (apart, (fresh[..., :16], fresh[..., 31:47].contiguous())),
    ):
        KrigingCorrector().correct_rows(RowCorrection(0, Rows(*held_in), rows, *computed, ((0, 100),), {}))
    for shifted, expected in zip(ours, apart, strict=True):
        torch.testing.assert_close(shifted, expected)


@pytest.mark.parametrize("num_fresh", [1, 16, 37])
def test_changes_are_what_fresh_rows_differ_by(num_fresh: int) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 50, 2, 16, device=DEVICE)
    fresh = torch.randperm(50)[:num_fresh].sort().values.to(DEVICE)
    computed = torch.randn(num_fresh, 2, 48, device=DEVICE)
    fresh_keys, fresh_values = computed[..., :16], computed[..., 32:]
    changes = changes_of(Rows(keys, values).kernel_rows, fresh.int(), fresh_keys, fresh_values)
    expected = torch.cat([fresh_keys - keys[fresh], fresh_values - values[fresh]], dim=1).transpose(0, 1)
    assert torch.equal(changes, expected)


SCALES = (0.05, 1.7)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize(("alike", "longest"), [(1.0, 1024), (0.0, 50)])
@pytest.mark.parametrize("kernels", [True, False])
def test_rows_in_fp8(
    dtype: torch.dtype, alike: float, longest: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shifts are those of the real numbers, and what they give is rounded once."""
    monkeypatch.setattr("lmcache.blend.correctors.kriging._LIMITS", PieceLimits(longest, longest // 2))
    if not kernels:
        monkeypatch.setattr(kriging_rows, "kernels_for", lambda _: False)
    torch.manual_seed(0)
    spans = ((0, 130), (135, 150), (160, 300))
    held = [
        rounded(x, dtype, scale) for x, scale in zip(torch.randn(2, 300, 2, 16, device=DEVICE), SCALES, strict=True)
    ]
    expected = [real(x, scale) for x, scale in zip(held, SCALES, strict=True)]
    rows = torch.randperm(300)[:60].sort().values
    fresh_keys, fresh_values = torch.randn(2, len(rows), 2, 16, device=DEVICE)
    corrector = KrigingCorrector(alike=alike)
    corrector.correct(
        LayerCorrection(
            0, *expected, rows.to(DEVICE), fresh_keys, fresh_values, spans, torch.arange(300, device=DEVICE), None
        )
    )
    before = [x.clone() for x in held]
    scales = torch.tensor(SCALES, device=DEVICE).view(2, 1)
    corrector.correct_rows(RowCorrection(0, Rows(*held, *scales), rows, fresh_keys, fresh_values, spans, {}))
    kept = torch.ones(300, dtype=torch.bool)
    kept[rows] = False
    for exact, ours, old, scale in zip(expected, held, before, SCALES, strict=True):
        once = rounded(exact, dtype, scale)
        errors = [float((real(x, scale) - exact)[kept].norm()) for x in (ours, once, old)]
        assert errors[0] <= 1.01 * errors[1] < 0.5 * errors[2]
        assert float((ours.float() != once.float())[kept].float().mean()) < 1e-2
