"""The choice of the highest scores, ties and NaN included."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lmcache.blend.top_rows import top_rows


def test_the_highest_scores_in_ascending_order_of_row():
    rows = top_rows(torch.tensor([1.0, 9.0, 3.0, 7.0]), 2)
    assert rows.tolist() == [1, 3]
    assert rows.dtype == torch.int64


def test_of_equal_scores_the_lower_row_wins():
    assert top_rows(torch.tensor([5.0, 2.0, 5.0, 5.0]), 2).tolist() == [0, 2]
    assert top_rows(torch.zeros(1000), 3).tolist() == [0, 1, 2]


def test_both_zeros_are_equal():
    assert top_rows(torch.tensor([-0.0, 0.0]), 1).tolist() == [0]


def test_nan_is_lower_than_every_number():
    scores = torch.tensor([math.nan, -math.inf, math.nan, 0.0, math.inf])
    chosen = [top_rows(scores, count).tolist() for count in range(6)]
    assert chosen == [[], [4], [3, 4], [1, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]


def test_only_eligible_rows_are_chosen_and_at_most_all_of_them():
    scores = torch.tensor([9.0, 1.0, 8.0, 2.0])
    eligible = torch.tensor([False, True, False, True])
    assert top_rows(scores, 1, eligible).tolist() == [3]
    assert top_rows(scores, 4, eligible).tolist() == [1, 3]
    assert top_rows(scores, 4, torch.zeros(4, dtype=torch.bool)).tolist() == []


def test_nothing_to_choose_from():
    assert top_rows(torch.empty(0), 3).tolist() == []


@given(
    st.lists(st.one_of(st.sampled_from([-0.0, 0.0, 1.0, -math.inf, math.inf, math.nan]), st.floats(width=32))),
    st.integers(0, 40),
    st.data(),
)
def test_against_a_sort_by_hand(scores, count, data):
    eligible = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    best_first = sorted(
        (row for row in range(len(scores)) if eligible[row]),
        key=lambda row: (math.isnan(scores[row]), 0.0 if math.isnan(scores[row]) else -scores[row], row),
    )
    got = top_rows(torch.tensor(scores, dtype=torch.float32), count, torch.tensor(eligible, dtype=torch.bool))
    assert got.tolist() == sorted(best_first[:count])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_every_real_dtype(dtype):
    assert top_rows(torch.tensor([0, 1, 0, 1], dtype=dtype), 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("scores", "count", "eligible", "named"),
    [
        (torch.zeros(2, 3), 1, None, r"\[2, 3\]"),
        (torch.zeros(3), -1, None, "count=-1"),
        (torch.zeros(3), 1, torch.ones(2, dtype=torch.bool), r"\[3\].*\[2\]"),
        (torch.zeros(3), 1, torch.ones(3, dtype=torch.int64), "int64"),
    ],
)
def test_mistakes_are_named(scores, count, eligible, named):
    with pytest.raises(ValueError, match=named):
        top_rows(scores, count, eligible)
