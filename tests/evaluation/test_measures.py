from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.evaluation.measures import contains_answer, kl_divergence, token_agreement

LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5).map(torch.tensor)
TOKENS = st.lists(st.integers(0, 3), max_size=8)


@given(LOGITS, LOGITS)
def test_kl_is_the_sum_of_p_log_p_over_q(reference: torch.Tensor, logits: torch.Tensor) -> None:
    p, q = torch.softmax(reference.double(), 0), torch.softmax(logits.double(), 0)
    expected = float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))
    assert kl_divergence(reference, logits) == pytest.approx(expected, abs=1e-9)


@given(LOGITS, st.floats(-5, 5))
def test_kl_of_equal_distributions_is_zero(logits: torch.Tensor, shift: float) -> None:
    assert kl_divergence(logits, logits) == 0
    assert kl_divergence(logits.double(), logits.double() + shift) == pytest.approx(0, abs=1e-12)


def test_kl_takes_half_precision_without_rounding_in_it() -> None:
    reference = torch.tensor([10.0, 0.0], dtype=torch.bfloat16)
    assert kl_divergence(reference, torch.zeros(2)) == pytest.approx(0.692648, abs=1e-6)


@pytest.mark.parametrize(
    ("reference", "tokens", "agreement"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [1, 9, 3, 4], 0.75),
        ([1, 2, 3, 4], [1, 2], 0.5),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([1], [2], 0.0),
        ([], [], 1.0),
        ([], [1], 0.0),
    ],
)
def test_agreement_counts_positions_of_the_longer_answer(
    reference: list[int], tokens: list[int], agreement: float
) -> None:
    assert token_agreement(reference, tokens) == agreement


@given(TOKENS, TOKENS)
def test_agreement_is_symmetric_and_1_only_for_equal_answers(one: list[int], other: list[int]) -> None:
    agreement = token_agreement(one, other)
    assert agreement == token_agreement(other, one)
    assert 0 <= agreement <= 1
    assert (agreement == 1) == (one == other)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("She works at the Ivory Brewery.", "ivory brewery", True),
        ("THE IVORY, BREWERY", "Ivory Brewery", True),
        ("the Ivory Old Brewery", "Ivory Brewery", False),
        ("Three people do.", "3", True),
        ("There are 3.", "three", True),
        ("It was in 1930.", "3", False),
        ("Yorkshire", "York", False),
        ("", "York", False),
    ],
)
def test_an_answer_is_found_by_its_words(text: str, answer: str, found: bool) -> None:
    assert contains_answer(text, answer) is found
