"""``SelectionContext.choose`` against its definition, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.blend.selection import SelectionContext
from tests.blend.policies.batches import Prompt, batches, chosen_rows, context_of

SCORES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 2.0, math.inf, math.nan])


def by_definition(
    context: SelectionContext,
    scores: list[float],
    ratios: list[float],
    already: list[bool],
    within: list[bool],
) -> list[bool]:
    chosen = [bool(forced) or before for forced, before in zip(context.forced, already, strict=True)]
    for (start, end), ratio in zip(context.prompts, ratios, strict=True):
        reusable = [row for row in range(start, end) if context.reusable[row]]
        left = math.floor(len(reusable) * ratio + 0.5)
        left -= sum(chosen[row] and not context.forced[row] for row in reusable)
        candidates = [row for row in reusable if not chosen[row] and within[row]]
        candidates.sort(key=lambda row: (math.isnan(scores[row]), -scores[row], row))
        for row in candidates[: max(left, 0)]:
            chosen[row] = True
    return chosen


@given(data=st.data(), batch=batches())
def test_against_the_definition(data: st.DataObject, batch: list[Prompt]) -> None:
    context = context_of(*batch)
    size = context.num_rows
    scores = data.draw(st.lists(SCORES, min_size=size, max_size=size))
    masks = st.lists(st.booleans(), min_size=size, max_size=size)
    already, within = data.draw(masks), data.draw(masks)
    already = [chosen and bool(reusable) for chosen, reusable in zip(already, context.reusable, strict=True)]
    ratios = data.draw(st.lists(st.floats(0, 1), min_size=len(batch), max_size=len(batch)))
    found = context.choose(
        torch.tensor(scores), ratios=ratios, already=torch.tensor(already), within=torch.tensor(within)
    )
    assert found.tolist() == by_definition(context, scores, ratios, already, within)


@given(batch=batches())
def test_left_out_arguments(batch: list[Prompt]) -> None:
    context = context_of(*batch)
    scores = torch.arange(context.num_rows).float()
    nothing, everything = [False] * context.num_rows, [True] * context.num_rows
    expected = by_definition(context, scores.tolist(), list(context.ratios), nothing, everything)
    assert context.choose(scores).tolist() == expected


def test_the_masks_of_the_context_stay_as_they_are() -> None:
    context = context_of(Prompt((("moved", 4), ("new", 1)), ratio=0.5))
    already = torch.tensor([True, False, False, False, False])
    context.choose(torch.arange(5), already=already)
    assert context.forced.tolist() == [False] * 4 + [True]
    assert already.tolist() == [True] + [False] * 4


def test_what_was_chosen_before_counts_and_stays_even_beyond_the_budget() -> None:
    context = context_of(Prompt((("moved", 10), ("new", 1)), ratio=0.2))
    scores = torch.arange(11)
    for before, chosen in [([0], [0, 9]), ([0, 1], [0, 1]), ([0, 1, 2], [0, 1, 2])]:
        already = torch.zeros(11, dtype=torch.bool)
        already[before] = True
        assert chosen_rows(context, context.choose(scores, already=already)) == chosen


def test_forced_rows_of_a_passage_are_not_charged_to_its_budget() -> None:
    context = context_of(Prompt((("moved", 10),), suffix=4, ratio=0.2))
    assert chosen_rows(context, context.choose(torch.arange(10))) == [4, 5]


@pytest.mark.parametrize(
    ("reusable", "ratio", "tokens"), [(10, 0.15, 2), (10, 0.25, 3), (10, 0.04, 0), (0, 1.0, 0), (7, 1.0, 7)]
)
def test_a_budget_is_rounded_with_halves_up(reusable: int, ratio: float, tokens: int) -> None:
    assert SelectionContext.budget(reusable, ratio) == tokens


def test_ratios_of_another_batch_are_refused() -> None:
    context = context_of(Prompt((("moved", 4),)))
    with pytest.raises(ValueError, match="zip"):
        context.choose(torch.arange(4), ratios=[0.1, 0.2])
