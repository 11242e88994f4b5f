"""Prompts cut after every separator."""

from __future__ import annotations

from itertools import chain

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lmcache.segmentation.separator import cut_after_separator


def cut(tokens: list[int], separator: list[int]) -> list[list[int]]:
    segments = cut_after_separator(torch.tensor(tokens, dtype=torch.int64), torch.tensor(separator))
    return [segment.tolist() for segment in segments]


@pytest.mark.parametrize(
    ("tokens", "separator", "segments"),
    [
        ([1, 2, 9, 3, 9, 4], [9], [[1, 2, 9], [3, 9], [4]]),
        ([1, 2, 9], [9], [[1, 2, 9]]),
        ([1, 2], [9], [[1, 2]]),
        ([9, 9, 1], [9], [[9], [9], [1]]),
        ([1, 8, 9, 2, 8, 9], [8, 9], [[1, 8, 9], [2, 8, 9]]),
        ([1, 8, 2, 9, 3], [8, 9], [[1, 8, 2, 9, 3]]),
        ([7, 7, 7, 1], [7, 7], [[7, 7], [7], [1]]),
        ([7, 8, 7, 8, 7, 1], [7, 8, 7], [[7, 8, 7], [8, 7], [1]]),
        ([8], [8, 9], [[8]]),
        ([8, 9], [8, 9], [[8, 9]]),
        ([], [9], []),
        ([], [8, 9], []),
    ],
    ids=[
        "a remainder is a segment",
        "at the end",
        "no separator",
        "nothing but separators",
        "of two tokens",
        "halves are none",
        "overlapping itself",
        "overlapping in one token",
        "shorter than the separator",
        "nothing but one separator",
        "nothing",
        "nothing, long separator",
    ],
)
def test_cutting(tokens, separator, segments):
    assert cut(tokens, separator) == segments


prompts = st.lists(st.integers(0, 2), max_size=40)


@given(prompts, st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_what_is_true_of_every_cut(tokens, separator):
    segments = cut(tokens, separator)
    assert list(chain.from_iterable(segments)) == tokens
    assert all(segments), "no segment is empty"
    ends = [sum(map(len, segments[: i + 1])) for i in range(len(segments))]
    after_separators = {
        end for end in range(len(separator), len(tokens) + 1) if tokens[end - len(separator) : end] == separator
    }
    assert set(ends) == after_separators | ({len(tokens)} if tokens else set())


def test_dtypes_may_differ():
    segments = cut_after_separator(torch.tensor([1, 9, 2], dtype=torch.int32), torch.tensor([9], dtype=torch.int64))
    assert [segment.tolist() for segment in segments] == [[1, 9], [2]]
    assert segments[0].dtype == torch.int32


def test_segments_are_views():
    tokens = torch.tensor([1, 9, 2])
    assert [segment.data_ptr() - tokens.data_ptr() for segment in cut_after_separator(tokens, torch.tensor([9]))] == [
        0,
        16,
    ]


@pytest.mark.parametrize(
    ("tokens", "separator", "named"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), "separator is empty"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), r"tokens: .*\[1, 3\]"),
        (torch.zeros(3), torch.zeros(1, dtype=torch.int64), "tokens: .*float32"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(1), "separator: .*float32"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor(9), "separator: "),
    ],
)
def test_mistakes_are_named(tokens, separator, named):
    with pytest.raises(ValueError, match=named):
        cut_after_separator(tokens, separator)
