from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.blend.plan import BlendPlan, Reason, ReusedSpan

TOKENS = 40


@st.composite
def hits(draw: st.DrawFn) -> list[ReusedSpan]:
    """Any hits in a prompt of 40 tokens, overlapping and repeated ones included."""
    found = []
    for source in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, TOKENS - 1))
        end = draw(st.integers(start + 1, TOKENS))
        exact = draw(st.booleans())
        old = start if exact else draw(st.integers(0, 100))
        found.append(ReusedSpan(start, end, source, draw(st.integers(0, 5)), old, exact))
    return found


@given(hits(), st.integers(1, TOKENS), st.integers(1, 5))
def test_every_token_has_one_fate_and_only_winners_lose_nothing(found, suffix, min_tokens):
    plan = BlendPlan.of(TOKENS, found, suffix_tokens=suffix, min_tokens=min_tokens)
    ranges = plan.ranges()
    assert [r.start for r in ranges] == [0, *(r.end for r in ranges[:-1])]
    assert ranges[-1].end == TOKENS
    exact, reusable, forced = plan.exact(), plan.reusable(), plan.forced()
    for r in ranges:
        rows = slice(r.start, r.end)
        assert bool(exact[rows].all()) == (r.reason is Reason.EXACT)
        assert bool(forced[rows].all()) == r.reason.computed
        assert bool(reusable[rows].any()) <= (r.reason in (Reason.MOVED, Reason.SUFFIX))
    assert not bool((exact & (reusable | forced)).any())
    assert bool((exact | reusable | forced).all())
    # Each token that is reused comes from a hit that has it, at the position that the hit says.
    for span in plan.spans:
        hit = found[span.source]
        assert hit.start <= span.start < span.end <= hit.end
        assert span.old_start - span.start == hit.old_start - hit.start
        assert span.source_start - span.start == hit.source_start - hit.start
        whole = (span.start, span.end) == (hit.start, hit.end)
        assert whole or span.end - span.start >= min_tokens
    if min_tokens == 1:
        covered = torch.arange(TOKENS) >= TOKENS - suffix
        for hit in found:
            covered[hit.start : hit.end] = True
        assert torch.equal(exact | reusable | (torch.arange(TOKENS) >= TOKENS - suffix), covered)


@given(hits(), st.integers(1, TOKENS), st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS))
def test_is_data(found, suffix, chosen):
    plan = BlendPlan.of(TOKENS, found, suffix_tokens=suffix)
    plan = plan.select((torch.tensor(chosen) & ~plan.exact()) | plan.forced(), "some_policy")
    assert BlendPlan.from_json(plan.to_json()) == plan
    assert hash(BlendPlan.from_json(plan.to_json())) == hash(plan)
    computed = sum(r.end - r.start for r in plan.ranges() if r.reason.computed)
    assert f"{TOKENS} tokens, {computed} computed, policy some_policy" in str(plan)


def test_reads_as_a_table():
    plan = BlendPlan.of(
        30, [ReusedSpan(0, 5, 0, exact=True), ReusedSpan(5, 15, 1, old_start=100), ReusedSpan(20, 30, 2)]
    )
    chosen = plan.forced()
    chosen[7:9] = True
    assert str(plan.select(chosen, "query_attention")).splitlines() == [
        "30 tokens, 8 computed, policy query_attention",
        "       0 … 4      reused as it is: the same tokens stand before it (source 0, from position 0)",
        "       5 … 6      reused, moved (source 1, from position 100)",
        "       7 … 8      computed: chosen by the policy (source 1, from position 102)",
        "       9 … 14     reused, moved (source 1, from position 104)",
        "      15 … 19     computed: not cached",
        "      20 … 28     reused, moved (source 2, from position 0)",
        "      29 … 29     computed: end of the prompt (source 2, from position 9)",
    ]


def test_the_longer_hit_wins_and_the_loser_keeps_the_rest():
    plan = BlendPlan.of(40, [ReusedSpan(0, 10, 0), ReusedSpan(5, 25, 1), ReusedSpan(22, 30, 2, source_start=3)])
    assert plan.spans == (
        ReusedSpan(0, 5, 0),
        ReusedSpan(5, 25, 1),
        ReusedSpan(25, 30, 2, source_start=6, old_start=3),
    )


def test_an_exact_hit_behind_a_hole_is_not_exact():
    """Exactness is promised only for what follows from the first token on without a hole."""
    plan = BlendPlan.of(20, [ReusedSpan(5, 10, 0, old_start=5, exact=True)])
    assert not bool(plan.exact().any())
    assert int(plan.reusable().sum()) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReusedSpan(3, 3, 0), "must not be empty"),
        (lambda: ReusedSpan(0, 3, -1), "must not be negative"),
        (lambda: ReusedSpan(2, 3, 0, old_start=7, exact=True), "position 7, not 2"),
        (lambda: BlendPlan(0), "at least one token"),
        (lambda: BlendPlan(5, suffix_tokens=6), "1 … 5"),
        (lambda: BlendPlan(5, (ReusedSpan(0, 6, 0),)), "ends beyond 5"),
        (lambda: BlendPlan(9, (ReusedSpan(0, 4, 0), ReusedSpan(3, 6, 0))), "overlaps"),
        (lambda: BlendPlan(5).select(torch.zeros(5, dtype=torch.bool), "lazy"), "'lazy' left out"),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_json_that_is_no_plan_is_refused():
    for raw in (b"{}", b'{"num_tokens": "many"}', b'{"num_tokens": 3, "spans": [{"start": 2}]}'):
        with pytest.raises(msgspec.ValidationError):
            BlendPlan.from_json(raw)
