from __future__ import annotations

from lmcache.evaluation.earlier_prompt import tokens_before
from lmcache.evaluation.prompt_parts import PromptParts

PARTS = PromptParts((0,), ((1, 1), (2,), (3,), (4, 4, 4), (5,), (6,)), (7,))
FOREIGN = ((91,), (92, 92))


def test_alone_nothing_stands_before() -> None:
    assert tokens_before("alone", PARTS, FOREIGN) == [[]] * 6


def test_behind_the_system_prompt_it_stands_before() -> None:
    assert tokens_before("system", PARTS, FOREIGN) == [[0]] * 6


def test_an_earlier_prompt_has_another_order_and_foreign_passages() -> None:
    before = tokens_before("prompt", PARTS, FOREIGN)
    in_order = sorted(range(6), key=lambda passage: len(before[passage]))
    assert in_order != list(range(6))
    prompt = [0]
    for at, passage in enumerate(in_order):
        if at in (0, 2):
            prompt += FOREIGN[at // 2]
        assert before[passage] == prompt
        prompt += PARTS.passage_ids[passage]


def test_without_foreign_passages_only_the_order_differs() -> None:
    before = tokens_before("prompt", PARTS, ())
    assert sorted(map(len, before))[0] == 1
