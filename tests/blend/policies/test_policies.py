from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings

from lmcache.blend.policies import POLICIES, make_policy, policy_names
from tests.blend.policies.batches import Prompt, batches, chosen_rows, context_of, probe_of
from tests.blend.policies.conformance import TWO_PASSAGES, PolicyConformance


@pytest.fixture(autouse=True, scope="module")
def installed() -> Iterator[None]:
    point = EntryPoint("Last-Tokens", "tests.blend.policies.third_party:LastTokensPolicy", "lmcache.blend_policies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lmcache.blend.plugins.entry_points", lambda group: [point] if group == "lmcache.blend_policies" else []
        )
        yield


class TestNone(PolicyConformance):
    policy_name = "none"
    ratio_decides = False

    def test_nothing_even_at_ratio_1(self) -> None:
        context = context_of(Prompt(TWO_PASSAGES.parts, 3, ratio=1.0))
        assert chosen_rows(context, self.select(context)) == []


class TestFull(PolicyConformance):
    policy_name = "full"
    ratio_decides = False

    def test_everything_even_at_ratio_0(self) -> None:
        context = context_of(Prompt(TWO_PASSAGES.parts, 3, ratio=0.0))
        assert chosen_rows(context, self.select(context)) == [*range(3, 13), *range(15, 25)]


class TestRandom(PolicyConformance):
    policy_name = "random"

    def test_these_tokens_on_every_rank_platform_and_version(self) -> None:
        chosen = {}
        for seed in (0, 1, -1):
            context = context_of(Prompt((("moved", 100), ("new", 1)), ratio=0.05), seed=seed)
            chosen[seed] = chosen_rows(context, self.select(context))
        # Philox4x64-10 with the seed as its key, computed by hand as well.
        assert chosen == {0: [33, 68, 77, 79, 93], 1: [33, 38, 55, 67, 71], -1: [20, 31, 40, 89, 94]}

    def test_every_token_has_its_chance(self) -> None:
        drawn = torch.zeros(41)
        for seed in range(400):
            context = context_of(Prompt((("moved", 40), ("new", 1)), ratio=0.25), seed=seed)
            drawn += self.select(context)
        assert bool(((drawn[:40] > 60) & (drawn[:40] < 140)).all())  # 100 expected, standard deviation 9


class TestSink(PolicyConformance):
    policy_name = "sink"

    def test_the_budget_is_spread_evenly(self) -> None:
        context = context_of(Prompt(TWO_PASSAGES.parts, 3, ratio=0.3))
        assert chosen_rows(context, self.select(context)) == [3, 4, 5, 15, 16, 17]

    def test_an_odd_token_goes_to_the_earlier_passage(self) -> None:
        context = context_of(Prompt(TWO_PASSAGES.parts, 3, ratio=0.25))
        assert chosen_rows(context, self.select(context)) == [3, 4, 5, 15, 16]

    def test_what_a_short_passage_cannot_take_goes_to_the_others(self) -> None:
        context = context_of(Prompt((("moved", 2), ("moved", 10), ("new", 1)), ratio=0.5))
        assert chosen_rows(context, self.select(context)) == [0, 1, 2, 3, 4, 5]


class TestSinkOfFixedSize(PolicyConformance):
    policy_name = "sink"
    options: ClassVar = {"k": 4}
    ratio_decides = False

    @pytest.mark.parametrize("ratio", [0.0, 0.9])
    def test_the_ratio_plays_no_part(self, ratio: float) -> None:
        context = context_of(Prompt((("moved", 6), ("new", 2), ("moved", 3), ("new", 1)), ratio=ratio))
        assert chosen_rows(context, self.select(context)) == [0, 1, 2, 3, 8, 9, 10]


class TestBoundary(PolicyConformance):
    policy_name = "boundary"

    def test_the_budget_is_spread_over_both_ends(self) -> None:
        context = context_of(Prompt(TWO_PASSAGES.parts, 3, ratio=0.4))
        assert chosen_rows(context, self.select(context)) == [3, 4, 11, 12, 15, 16, 23, 24]


class TestBoundaryOfFixedWidth(PolicyConformance):
    policy_name = "boundary"
    options: ClassVar = {"w": 2}
    ratio_decides = False

    @pytest.mark.parametrize("ratio", [0.0, 0.9])
    def test_the_ratio_plays_no_part(self, ratio: float) -> None:
        context = context_of(Prompt((("moved", 6), ("new", 2), ("moved", 3), ("new", 1)), ratio=ratio))
        assert chosen_rows(context, self.select(context)) == [0, 1, 4, 5, 8, 9, 10]


class TestQueryAttention(PolicyConformance):
    policy_name = "query_attention"

    def test_what_it_asks(self) -> None:
        context = context_of(TWO_PASSAGES)
        self.select(context)
        assert probe_of(context).asked == [{"span": 8, "layers": None, "heads": "mean"}]

    def test_the_most_attended_tokens(self) -> None:
        context = context_of(Prompt((("moved", 8), ("new", 1)), ratio=0.25))
        probe_of(context).attention[:] = torch.tensor([0, 0, 5, 0, 0, 0, 4, 1, 9.0])
        assert chosen_rows(context, self.select(context)) == [2, 6]

    def test_equal_attention_goes_to_the_earlier_token(self) -> None:
        context = context_of(Prompt((("moved", 8), ("new", 1)), ratio=0.25))
        probe_of(context).attention.zero_()
        assert chosen_rows(context, self.select(context)) == [0, 1]


class TestQueryAttentionOfLateLayers(PolicyConformance):
    policy_name = "query_attention"
    options: ClassVar = {"span": 3, "layers": "late", "heads": "max"}

    def test_what_it_asks(self) -> None:
        context = context_of(TWO_PASSAGES, num_layers=10)
        self.select(context)
        assert probe_of(context).asked == [{"span": 3, "layers": [6, 7, 8, 9], "heads": "max"}]

    @pytest.mark.parametrize(("num_layers", "first"), [(1, 0), (2, 1), (30, 18), (32, 19)])
    def test_which_layers_are_late(self, num_layers: int, first: int) -> None:
        context = context_of(TWO_PASSAGES, num_layers=num_layers)
        self.select(context)
        assert probe_of(context).asked[0]["layers"] == list(range(first, num_layers))


class TestQueryAttentionOfSomeLayers(PolicyConformance):
    policy_name = "query_attention"
    options: ClassVar = {"layers": [2, 5]}

    def test_a_layer_outside_the_model_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"layers=\[2, 5\]: the model has layers 0 … 4, not 5"):
            self.select(context_of(TWO_PASSAGES, num_layers=5))


class TestHybrid(PolicyConformance):
    policy_name = "hybrid"
    options: ClassVar = {"k": 2}

    def test_first_tokens_and_the_most_attended_others(self) -> None:
        context = context_of(Prompt(TWO_PASSAGES.parts, 3, ratio=0.3))
        probe_of(context).attention[:] = torch.arange(28)
        assert chosen_rows(context, self.select(context)) == [3, 4, 15, 16, 23, 24]

    def test_a_small_budget_is_spread_over_the_first_tokens(self) -> None:
        context = context_of(Prompt(TWO_PASSAGES.parts, 3, ratio=0.15))
        assert chosen_rows(context, self.select(context)) == [3, 4, 15]


class TestQueryAttentionOfAPartOfTheDepth(PolicyConformance):
    policy_name = "query_attention"
    options: ClassVar = {"layers": (0.4, 0.9)}

    @pytest.mark.parametrize(("num_layers", "layers"), [(1, [0]), (2, [0, 1]), (10, [4, 5, 6, 7, 8])])
    def test_which_layers_it_asks(self, num_layers: int, layers: list[int]) -> None:
        context = context_of(TWO_PASSAGES, num_layers=num_layers)
        self.select(context)
        assert probe_of(context).asked[0]["layers"] == layers


class TestSampledAttention(PolicyConformance):
    policy_name = "sampled_attention"

    def test_evenly_spaced_tokens_and_the_most_attended_others(self) -> None:
        context = context_of(Prompt((("moved", 30), ("new", 5), ("moved", 20), ("new", 1)), ratio=0.2))
        probe_of(context).attention[:] = torch.arange(56)
        assert chosen_rows(context, self.select(context)) == [4, 14, 24, 39, 49, 50, 51, 52, 53, 54]

    def test_a_smaller_ratio_spaces_them_wider(self) -> None:
        context = context_of(Prompt((("moved", 30), ("new", 5), ("moved", 20), ("new", 1)), ratio=0.12))
        probe_of(context).attention[:] = torch.arange(56)
        assert chosen_rows(context, self.select(context)) == [8, 24, 46, 52, 53, 54]

    def test_a_larger_ratio_goes_to_what_is_looked_at(self) -> None:
        context = context_of(Prompt((("moved", 30), ("new", 1)), ratio=0.5))
        probe_of(context).attention[:] = torch.arange(31)
        assert chosen_rows(context, self.select(context)) == [4, 14, *range(17, 30)]

    def test_the_even_sample_is_computed_while_it_looks(self) -> None:
        context = context_of(Prompt((("moved", 30), ("new", 5), ("moved", 20), ("new", 1)), ratio=0.2))
        self.select(context)
        (early,) = probe_of(context).computed
        assert torch.nonzero(early)[:, 0].tolist() == [4, 14, 24, 39, 49]

    def test_what_is_computed_whole_is_not_computed_early(self) -> None:
        """Early rows see neighbours that are only corrected, and a ratio of 1 is to be a full prefill."""
        passage = Prompt((("moved", 30), ("new", 1)), ratio=1.0)
        context = context_of(passage, Prompt(passage.parts, ratio=0.2))
        self.select(context)
        (early,) = probe_of(context).computed
        assert not bool(early[:31].any())
        assert int(early[31:].sum()) == 3

    def test_a_budget_of_no_token_computes_none_early(self) -> None:
        context = context_of(Prompt((("moved", 30), ("new", 1)), ratio=0.01))
        self.select(context)
        assert probe_of(context).computed == []


class TestLastTokens(PolicyConformance):
    """Of another distribution."""

    policy_name = "last_tokens"


class TestKVDeviation(PolicyConformance):
    policy_name = "kv_deviation"


class TestKVDeviationOfKeys(PolicyConformance):
    policy_name = "kv_deviation"
    options: ClassVar = {"check_layers": (2,), "tensor": "k"}


class TestGradualKVDeviation(PolicyConformance):
    policy_name = "kv_deviation"
    options: ClassVar = {"check_layers": [1, 3, 6], "tensor": "kv", "ratios": [0.6, 0.3, 0.15]}


class TestKVDeviationAboveThresholds(PolicyConformance):
    policy_name = "kv_deviation"
    options: ClassVar = {"check_layers": [1, 4], "thresholds": [0.8, 1.0]}
    ratio_decides = False


@pytest.mark.parametrize("case", PolicyConformance.__subclasses__())
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_any_batch(case: type[PolicyConformance], batch: list[Prompt]) -> None:
    case.check(*batch)


def test_every_policy_is_tested() -> None:
    assert {case.policy_name for case in PolicyConformance.__subclasses__()} == set(policy_names())


def test_the_names() -> None:
    ours = ["none", "full", "random", "sink", "boundary", "kv_deviation", "query_attention", "hybrid"]
    ours.append("sampled_attention")
    assert list(POLICIES.builtin) == ours
    assert policy_names() == [*ours, "last_tokens"]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'kv': must be one of none, full, .*, sampled_attention, last_tokens"):
        make_policy("kv")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none", {"k": 1}, "'none' with {'k': 1}: .*its options: none"),
        ("sink", {"tokens": 4}, "unexpected keyword argument 'tokens'.*its options: k"),
        ("sink", {"k": 0}, "k=0: must be at least 1, or None to spread"),
        ("sink", {"k": "4"}, "'sink' with {'k': '4'}: '<' not supported"),
        ("boundary", {"w": -1}, "w=-1: must be at least 1, or None to spread"),
        ("query_attention", {"span": 0}, "span=0: at least one token"),
        ("query_attention", {"layers": "early"}, "layers='early': must be None for all, 'late', a list"),
        ("query_attention", {"layers": (0.5, 0.2)}, "two that rise within 0.0 … 1.0"),
        ("query_attention", {"layers": (0.5, 1.2)}, "two that rise within 0.0 … 1.0"),
        ("query_attention", {"layers": (0.5,)}, "two that rise within 0.0 … 1.0"),
        ("sampled_attention", {"sample": 0.0}, "sample=0.0: must be above 0 .*take policy 'query_attention'"),
        ("sampled_attention", {"at_most": 2}, "at_most=2: must be above 0 and at most 1"),
        ("query_attention", {"layers": []}, "name at least one layer, or give None"),
        ("query_attention", {"heads": "median"}, "heads='median': must be one of mean, max"),
        ("hybrid", {"k": 0}, "k=0: must be at least 1.*take policy 'query_attention'"),
        ("hybrid", {"span": 0}, "span=0: at least one token"),
        ("kv_deviation", {"tensor": "q"}, "tensor='q': must be one of k, v, kv"),
        ("kv_deviation", {"check_layers": []}, "name at least one layer, in ascending order"),
        ("kv_deviation", {"check_layers": [3, 1]}, r"check_layers=\[3, 1\]: name at least one layer, in ascending"),
        ("kv_deviation", {"check_layers": [1, 3]}, r"check_layers=\[1, 3\]: several of them need ratios"),
        ("kv_deviation", {"check_layers": [1, 3], "ratios": [0.3]}, "give one for each of check_layers"),
        ("kv_deviation", {"check_layers": [1, 3], "ratios": [0.1, 0.3]}, "ratios=.*must not rise"),
        ("kv_deviation", {"check_layers": [1, 3], "ratios": [0.1, 0]}, "the last must be above 0.*policy 'none'"),
        ("kv_deviation", {"ratios": [15]}, r"ratios=\[15\]: each must be 0 … 1"),
        ("kv_deviation", {"thresholds": [-1.0]}, "thresholds=.*must not be negative"),
        ("kv_deviation", {"thresholds": [1.0, 2.0]}, "thresholds=.*give one for each"),
    ],
)
def test_bad_options_are_refused_in_words(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(name, **options)


@pytest.mark.parametrize("name", ["random", "sink", "boundary", "query_attention", "hybrid"])
def test_what_does_not_look_at_reused_tokens_is_charged_its_ratio(name: str) -> None:
    assert make_policy(name).ratio_for(0.15, 30) == 0.15
