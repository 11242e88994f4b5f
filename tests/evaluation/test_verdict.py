from __future__ import annotations

import pytest

from lmcache.evaluation.bootstrap import Interval
from lmcache.evaluation.errors import EvaluationError
from lmcache.evaluation.figures import Figures, Summary
from lmcache.evaluation.gate import DEFAULT_GATE, parse_gate
from lmcache.evaluation.variants import Variant
from lmcache.evaluation.verdict import judge


def figures(
    policy: str, budget: float, *, kl: float, agreement: float = 0.9, exact_match: float | None = 1.0, time: float = 0.2
) -> Figures:
    return Figures(
        variant=Variant(policy, "key_shift", budget, budget),
        charged_budget=budget,
        kl=_sure(kl),
        agreement=_sure(agreement),
        exact_match=None if exact_match is None else _sure(exact_match),
        time=_sure(time),
        fallbacks=0,
    )


def _sure(value: float) -> Interval:
    return Interval(value, 0.0, 100.0)


def summary(*some: Figures) -> Summary:
    return Summary(10, 5, list(some), [])


CHEAP = figures("query_attention", 0.05, kl=0.3)
GOOD = figures("query_attention", 0.1, kl=0.1)
DEAR = figures("kv_deviation", 0.15, kl=0.05)
NONE = figures("none", 0.0, kl=2.0)
FULL = figures("full", 1.0, kl=0.0)
GATE = parse_gate("kl=0.1, agreement=0.8")


@pytest.mark.parametrize(
    ("conditions", "failures"),
    [
        ("kl=0.3", []),
        ("kl=0.29", ["kl is 0.3, must be at most 0.29"]),
        ("agreement=0.9,exact_match=1,time=0.2", []),
        ("agreement=0.95,time=0.1", ["agreement is 0.9, must be at least 0.95", "time is 0.2, must be at most 0.1"]),
    ],
)
def test_each_condition_is_checked_on_the_mean(conditions: str, failures: list[str]) -> None:
    assert parse_gate(conditions).failures(CHEAP) == failures


def test_what_cannot_be_told_fails() -> None:
    unknown = figures("random", 0.1, kl=0.0, exact_match=None)
    assert parse_gate("exact_match=0").failures(unknown) == [
        "exact_match cannot be told: full prefill answers none of the tasks"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'': write FIGURE=LIMIT with a figure out of kl, agreement, exact_match, time"),
        ("kl", "'kl': write FIGURE=LIMIT"),
        ("speed=1", "'speed=1': write FIGURE=LIMIT"),
        ("kl=0.1,", "'': write FIGURE=LIMIT"),
        ("kl=low", "kl=low: 'low' is not a number"),
        ("kl=nan", "kl=nan: must be at least 0"),
        ("kl=inf", "kl=inf: must be at least 0"),
        ("time=-1", "time=-1: must be at least 0"),
        ("agreement=80", "agreement=80: must be from 0 to 1"),
        ("kl=1,kl=2", "kl is named twice"),
    ],
)
def test_says_what_is_wrong_with_a_gate(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        parse_gate(text)


def test_all_must_pass_but_the_anchors() -> None:
    verdict = judge(summary(NONE, CHEAP, GOOD, FULL), GATE, recommending=False)
    assert not verdict.passed
    assert list(verdict.lines()) == [
        "below the gate: query_attention + key_shift at 0.05: kl is 0.3, must be at most 0.1",
        "the gate (kl ≤ 0.1, agreement ≥ 0.8) is not passed",
    ]
    passed = judge(summary(NONE, GOOD, DEAR, FULL), GATE, recommending=False)
    assert passed.passed
    assert list(passed.lines()) == ["the gate (kl ≤ 0.1, agreement ≥ 0.8) is passed"]


def test_recommends_the_cheapest_that_passes() -> None:
    verdict = judge(summary(NONE, DEAR, GOOD, CHEAP, FULL), GATE, recommending=True)
    assert verdict.passed
    assert verdict.recommended is GOOD
    assert list(verdict.lines()) == [
        "recommended: policy query_attention, corrector key_shift, ratio 0.1: the cheapest that passes the gate "
        "(kl ≤ 0.1, agreement ≥ 0.8), at a charged budget of 10.0%"
    ]


def test_recommends_nothing_when_nothing_passes() -> None:
    verdict = judge(summary(NONE, CHEAP, FULL), DEFAULT_GATE, recommending=True)
    assert not verdict.passed
    assert list(verdict.lines())[-1].startswith("no policy and budget passes the gate")


def test_of_equal_budgets_the_better_one_is_recommended() -> None:
    better = figures("hybrid", 0.1, kl=0.05)
    assert judge(summary(GOOD, better), GATE, recommending=True).recommended is better
