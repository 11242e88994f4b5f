from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.evaluation.bootstrap import PairedBootstrap

VALUES = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)


@given(VALUES, st.integers(0, 3))
def test_the_interval_holds_the_mean_and_lies_among_the_values(values: list[float], seed: int) -> None:
    interval = PairedBootstrap(len(values), seed).mean(values)
    assert interval.value == pytest.approx(np.mean(values))
    slack = 1e-9 * max(values)
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack


@given(VALUES, st.floats(0.1, 10))
def test_pairing_takes_out_what_is_common_to_a_task(values: list[float], factor: float) -> None:
    interval = PairedBootstrap(len(values), 0).ratio([factor * value for value in values], values)
    assert interval is not None
    assert (interval.low, interval.value, interval.high) == pytest.approx((factor, factor, factor))


def test_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        interval = PairedBootstrap(40, seed).mean(generator.exponential(1.0, 40).tolist())
        covered += interval.low <= 1 <= interval.high
    assert 0.88 <= covered / 200 <= 0.98


def test_same_seed_same_interval() -> None:
    values = list(range(10))
    assert PairedBootstrap(10, 3).mean(values) == PairedBootstrap(10, 3).mean(values)
    assert PairedBootstrap(10, 3).mean(values) != PairedBootstrap(10, 4).mean(values)


def test_a_ratio_to_nothing_is_none() -> None:
    assert PairedBootstrap(3, 0).ratio([1, 2, 3], [0, 0, 0]) is None


def test_resamples_without_a_denominator_are_left_out() -> None:
    interval = PairedBootstrap(3, 0).ratio([0, 0, 1], [0, 0, 1])
    assert interval is not None
    assert (interval.low, interval.value, interval.high) == (1, 1, 1)
