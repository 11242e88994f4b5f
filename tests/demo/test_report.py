"""The demo must not say that all is well when it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from demo.conversation import Answer
from demo.report import SGLANG, Result

COLD = Answer("How long?", "210 metres.", 2_445, 0, {}, 4.0)
MEMORY = replace(COLD, reused_tokens=2_304, tokens_by_tier={"memory": 2_304}, seconds_to_first_token=0.4)
DISK = replace(COLD, reused_tokens=2_304, tokens_by_tier={"disk": 2_304}, seconds_to_first_token=0.5)
GOOD = Result([COLD], [COLD], [MEMORY], [DISK])


def test_a_good_result_has_no_problems() -> None:
    assert GOOD.problems() == []
    assert GOOD.median_ratios() == (10.0, 8.0)


@pytest.mark.parametrize("stage", ["first_held", "from_memory", "from_disk"])
def test_other_text_is_a_problem(stage: str) -> None:
    wrong = [replace(answer, text="140 metres.") for answer in getattr(GOOD, stage)]
    (problem,) = replace(GOOD, **{stage: wrong}).problems()
    assert "140 metres." in problem


@pytest.mark.parametrize("stage", ["from_memory", "from_disk"])
def test_nothing_reused_is_a_problem(stage: str) -> None:
    (problem,) = replace(GOOD, **{stage: [COLD]}).problems()
    assert "nothing came from" in problem


def test_sglang_does_not_tell_the_tiers_apart() -> None:
    reused = replace(COLD, reused_tokens=2_304, tokens_by_tier={"storage": 2_304}, seconds_to_first_token=2.0)
    own = replace(reused, tokens_by_tier={"SGLang's own cache": 2_304})
    assert Result([COLD], [own], [reused], [reused], SGLANG).problems() == []
    (problem,) = Result([COLD], [own], [reused], [own], SGLANG).problems()
    assert "after the restart: nothing came from storage" in problem


def test_the_wrong_tier_is_a_problem() -> None:
    (problem,) = replace(GOOD, from_disk=[MEMORY]).problems()
    assert "nothing came from disk" in problem
