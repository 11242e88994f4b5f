"""Check layers, gradual filtering, thresholds, and what they are charged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lmcache.blend.policies.kv_deviation import KVDeviationPolicy
from tests.blend.policies.batches import Prompt, chosen_rows, context_of, probe_of

TEN = Prompt((("exact", 2), ("moved", 10), ("new", 2)), suffix=2, ratio=0.2)
LAYERS = 30


def test_the_tokens_that_deviate_most() -> None:
    context = context_of(TEN)
    probe_of(context).deviations[1][:] = torch.tensor([9, 9, 0, 1, 2, 8, 0, 0, 7, 3, 0, 0, 9, 9.0])
    assert chosen_rows(context, KVDeviationPolicy().select(context)) == [5, 8]
    assert probe_of(context).asked == [{"layer": 1, "tensor": "v"}]


def test_equal_deviations_go_to_the_earlier_token() -> None:
    context = context_of(TEN)
    probe_of(context).deviations[1].fill_(1.0)
    assert chosen_rows(context, KVDeviationPolicy().select(context)) == [2, 3]


def test_all_rows_that_are_not_exact_are_looked_at() -> None:
    context = context_of(TEN)
    KVDeviationPolicy().select(context)
    assert probe_of(context).looked_at[0].tolist() == [False] * 2 + [True] * 12


def test_prompts_with_nothing_to_decide_are_not_looked_at() -> None:
    parts = TEN.parts
    context = context_of(Prompt(parts, 2, 0.0), Prompt(parts, 2, 0.2), Prompt(parts, 2, 1.0))
    KVDeviationPolicy().select(context)
    assert torch.equal(probe_of(context).looked_at[0][:14], context.forced[:14])
    assert torch.equal(probe_of(context).looked_at[0][28:], context.forced[28:])


def test_each_check_layer_narrows_down_what_the_last_one_kept() -> None:
    context = context_of(Prompt(TEN.parts, 2, ratio=0.2))
    deviations = probe_of(context).deviations
    deviations[1][:] = torch.tensor([0, 0, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0.0])
    deviations[4][:] = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0.0])
    policy = KVDeviationPolicy(check_layers=(1, 4), ratios=(0.4, 0.2))
    assert chosen_rows(context, policy.select(context)) == [4, 5]
    looked_at = probe_of(context).looked_at
    assert chosen_rows(context, looked_at[0]) == list(range(2, 12))
    assert chosen_rows(context, looked_at[1]) == [2, 3, 4, 5]


@pytest.mark.parametrize(("ratio", "kept"), [(0.1, 2), (0.2, 4), (0.4, 8), (0.7, 10)])
def test_a_prompts_ratio_is_that_of_the_last_stage_and_scales_the_others(ratio: float, kept: int) -> None:
    context = context_of(Prompt(TEN.parts, 2, ratio))
    chosen = KVDeviationPolicy(check_layers=(1, 4), ratios=(0.4, 0.2)).select(context)
    assert len(chosen_rows(context, probe_of(context).looked_at[1])) == kept
    assert len(chosen_rows(context, chosen)) == round(10 * ratio)


def test_a_threshold_counts_in_units_of_the_mean_of_the_prompt() -> None:
    context = context_of(TEN, Prompt(TEN.parts, 2, ratio=0.9))
    values = torch.tensor([99, 99, 0, 1, 2, 8, 0, 0, 7, 2, 0, 0, 99, 99.0])  # the mean of the ten is 2
    probe_of(context).deviations[1][:] = torch.cat([values, values * 1000])
    policy = KVDeviationPolicy(thresholds=(1.0,))
    assert chosen_rows(context, policy.select(context)) == [5, 8, 14 + 5, 14 + 8]


def test_a_second_threshold_counts_in_units_of_what_is_left() -> None:
    context = context_of(TEN)
    deviations = probe_of(context).deviations
    deviations[1][:] = torch.tensor([0, 0, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0.0])
    deviations[4][:] = torch.tensor([0, 0, 1, 2, 3, 6, 99, 99, 99, 99, 99, 99, 0, 0.0])
    policy = KVDeviationPolicy(check_layers=(1, 4), thresholds=(1.0, 1.0))
    assert chosen_rows(context, policy.select(context)) == [5]


def test_forced_tokens_of_a_passage_do_not_count_in_the_mean() -> None:
    context = context_of(Prompt((("moved", 6),), suffix=2))
    probe_of(context).deviations[1][:] = torch.tensor([0, 1, 2, 3, 99, 99.0])
    assert chosen_rows(context, KVDeviationPolicy(thresholds=(1.0,)).select(context)) == [2, 3]


def test_a_token_that_a_stage_dropped_never_comes_back() -> None:
    context = context_of(TEN)
    probe_of(context).deviations[1][:] = torch.arange(14)
    probe_of(context).deviations[4].fill_(torch.nan)
    policy = KVDeviationPolicy(check_layers=(1, 4), ratios=(0.4, 0.2))
    assert chosen_rows(context, policy.select(context)) == [8, 9]


@pytest.mark.parametrize(("ratio", "chosen"), [(0.0, []), (1.0, list(range(2, 12)))])
def test_ratios_0_and_1_count_in_spite_of_a_threshold(ratio: float, chosen: list[int]) -> None:
    context = context_of(Prompt(TEN.parts, 2, ratio))
    assert chosen_rows(context, KVDeviationPolicy(thresholds=(1.0,)).select(context)) == chosen


def test_where_nothing_deviates_no_threshold_is_exceeded() -> None:
    context = context_of(TEN)
    probe_of(context).deviations[1].zero_()
    assert chosen_rows(context, KVDeviationPolicy(thresholds=(0.0,)).select(context)) == []


@pytest.mark.parametrize("layers", [(30,), (-1, 2)])
def test_a_layer_outside_the_model_is_refused(layers: tuple[int, ...]) -> None:
    policy = KVDeviationPolicy(check_layers=layers, ratios=[0.2] * len(layers))
    for use in (lambda: policy.select(context_of(TEN, num_layers=30)), lambda: policy.ratio_for(0.1, 30)):
        with pytest.raises(ValueError, match=r"check_layers=.*the model has layers 0 … 29, not"):
            use()


def test_layers_0_and_1_are_charged_for_all_tokens() -> None:
    assert KVDeviationPolicy().ratio_for(0.15, LAYERS) == pytest.approx((0.15 * 30 - 2) / 28)
    assert KVDeviationPolicy().ratio_for(2 / 30, LAYERS) == 0.0
    assert KVDeviationPolicy().ratio_for(0.05, LAYERS) < 0


def test_a_check_at_the_last_layer_costs_everything() -> None:
    policy = KVDeviationPolicy(check_layers=(LAYERS - 1,))
    assert policy.ratio_for(0.99, LAYERS) < 0
    assert policy.ratio_for(1.0, LAYERS) == 1.0


@st.composite
def gradual(draw: st.DrawFn) -> KVDeviationPolicy:
    layers = sorted(draw(st.sets(st.integers(0, LAYERS - 2), min_size=1, max_size=4)))
    share = st.floats(0.01, 1)
    ratios = sorted(draw(st.lists(share, min_size=len(layers), max_size=len(layers))), reverse=True)
    return KVDeviationPolicy(check_layers=layers, ratios=ratios)


@given(policy=gradual(), budget=st.floats(0, 1))
def test_it_is_charged_the_budget_that_its_ratio_is_for(policy: KVDeviationPolicy, budget: float) -> None:
    """Counted on a prompt of so many tokens that rounding does not matter."""
    ratio = policy.ratio_for(budget, LAYERS)
    assume(0 < ratio < 1)
    context = context_of(Prompt((("moved", 2000), ("new", 1)), ratio=ratio), num_layers=LAYERS)
    computed = policy.select(context)
    fresh = torch.zeros(LAYERS, context.num_rows, dtype=torch.bool)
    for question, rows in zip(probe_of(context).asked, probe_of(context).looked_at, strict=True):
        fresh[: question["layer"] + 1] |= rows
    fresh |= computed
    assert float((fresh & context.reusable).sum() / (LAYERS * 2000)) == pytest.approx(budget, abs=2e-3)
