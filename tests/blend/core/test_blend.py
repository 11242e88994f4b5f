"""The blend on a small model, against its definition spelled out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.blend.batch import BlendPrompt
from lmcache.blend.blend_pass import BlendResult, blend
from lmcache.blend.correctors.interface import Corrector, LayerCorrection
from lmcache.blend.plan import BlendPlan, Reason, ReusedSpan
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.selection import SelectionContext
from tests.blend.core.tiny_model import LAYERS, VOCAB, LayerKVPair, Stored, TinyHost, TinyModel, TinyRope, rotate

MODEL = TinyModel()
ROPES = [TinyRope()] * LAYERS


class Chosen(SelectionPolicy):
    """Selects the rows it was given."""

    name = "chosen"

    def __init__(self, rows: Sequence[int] = ()) -> None:
        self.rows = list(rows)

    def select(self, context: SelectionContext) -> torch.Tensor:
        chosen = context.forced.clone()
        chosen[self.rows] = True
        return chosen


class Earliest(SelectionPolicy):
    name = "earliest"

    def select(self, context: SelectionContext) -> torch.Tensor:
        return context.choose(torch.zeros(context.num_rows))


class Everything(SelectionPolicy):
    name = "everything"

    def select(self, context: SelectionContext) -> torch.Tensor:
        return context.forced | context.reusable


class Gradual(SelectionPolicy):
    """Looks at V in two layers, and narrows."""

    name = "gradual"

    def select(self, context: SelectionContext) -> torch.Tensor:
        first = context.choose(context.deviation(1), ratios=[0.6] * len(context.prompts))
        return context.choose(context.deviation(2, rows=first), within=first)


class Asking(SelectionPolicy):
    name = "asking"

    def __init__(self, **options: Any) -> None:
        self.options = {"span": 4, **options}
        self.scores = torch.empty(0)

    def select(self, context: SelectionContext) -> torch.Tensor:
        self.scores = context.attention_received(**self.options)
        return context.choose(self.scores)


class AsItIs(Corrector):
    name = "as_it_is"

    def correct(self, layer: LayerCorrection) -> None:
        return


class AddOne(Corrector):
    """Adds one to every key of every span; remembers which layers it saw with how many fresh rows."""

    name = "add_one"

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def correct(self, layer: LayerCorrection) -> None:
        self.seen.append((layer.layer_id, len(layer.rows)))
        for start, end in layer.spans:
            layer.keys[start:end] += 1


def ids_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def run(
    prompts: Sequence[torch.Tensor],
    blends: Sequence[BlendPrompt],
    policy: SelectionPolicy,
    corrector: Corrector | None = None,
) -> BlendResult[torch.Tensor]:
    return blend(TinyHost(MODEL, prompts), blends, ROPES, policy, corrector or AsItIs())


def moved(ids: torch.Tensor, prompt: BlendPrompt) -> list[LayerKVPair]:
    """The KV of all spans, re-rotated into place; zero elsewhere."""
    layers = []
    for index in range(LAYERS):
        like = next(iter(prompt.sources)).kv[0].k
        k, v = like.new_zeros(len(ids), *like.shape[1:]), like.new_zeros(len(ids), *like.shape[1:])
        for span in prompt.plan.spans:
            source = prompt.sources[span.source].kv[index]
            taken = slice(span.source_start, span.source_start + span.end - span.start)
            distance = torch.full((span.end - span.start,), span.start - span.old_start)
            k[span.start : span.end] = rotate(source.k[taken], distance)
            v[span.start : span.end] = source.v[taken]
        layers.append(LayerKVPair(k, v))
    return layers


def check(result: BlendResult[torch.Tensor], ids: torch.Tensor, prompt: BlendPrompt, start: int = 0) -> None:
    """``result`` at rows ``start …`` is the blend of ``prompt`` by definition, for what its plan says was computed."""
    (index,) = [i for i, plan in enumerate(result.plans) if plan.num_tokens == len(ids)]
    plan = result.plans[index]
    computed = torch.zeros(len(ids), dtype=torch.bool)
    for r in plan.ranges():
        computed[r.start : r.end] = r.reason.computed
    stale = moved(ids, prompt) if prompt.plan.spans else None
    logits, kv = MODEL.blend(ids, computed, stale)
    torch.testing.assert_close(result.output[index], logits, rtol=1e-6, atol=1e-6)
    for layer, pair in enumerate(kv):
        rows = slice(start, start + len(ids))
        torch.testing.assert_close(result.keys[layer][rows], pair.k, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.values[layer][rows], pair.v, rtol=1e-6, atol=1e-6)


@st.composite
def blends(draw: st.DrawFn, seed: int = 0) -> tuple[torch.Tensor, BlendPrompt]:
    """A prompt made of passages (cached at any position, some twice, some cut), new tokens, holes."""
    pieces: list[torch.Tensor] = []
    sources: list[Stored] = []
    hits: list[ReusedSpan] = []
    at = 0
    for index in range(draw(st.integers(1, 4))):
        passage = ids_of(draw(st.integers(1, 9)), seed * 1000 + draw(st.integers(0, 2)))
        if draw(st.booleans()) or not pieces:
            old = draw(st.integers(0, 60))
            cut = draw(st.integers(0, len(passage) - 1))
            sources.append(Stored(MODEL.prefill(passage, start=old)[1]))
            hits.append(ReusedSpan(at, at + len(passage) - cut, len(sources) - 1, cut, old + cut))
            passage = passage[cut:]
        pieces.append(passage)
        at += len(passage)
        if draw(st.booleans()):
            pieces.append(ids_of(draw(st.integers(1, 6)), seed * 1000 + 100 + index))
            at += len(pieces[-1])
    suffix = draw(st.integers(1, at))
    prompt = BlendPrompt(BlendPlan.of(at, hits, suffix_tokens=suffix), sources, draw(st.sampled_from([0.0, 0.3, 1.0])))
    return torch.cat(pieces), prompt


@settings(max_examples=60)
@given(blends(), st.data())
def test_any_selection_gives_the_blend_by_definition(case, data):
    ids, prompt = case
    reusable = torch.nonzero(prompt.plan.reusable())[:, 0].tolist()
    rows = data.draw(st.lists(st.sampled_from(reusable), max_size=10)) if reusable else []
    check(run([ids], [prompt], Chosen(rows)), ids, prompt)


@settings(max_examples=40)
@given(blends())
def test_computing_everything_is_a_full_prefill(case):
    ids, prompt = case
    result = run([ids], [prompt], Everything())
    logits, kv = MODEL.prefill(ids)
    torch.testing.assert_close(result.output[0], logits, rtol=1e-8, atol=1e-8)
    for layer, pair in enumerate(kv):
        torch.testing.assert_close(result.keys[layer], pair.k, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(result.values[layer], pair.v, rtol=1e-8, atol=1e-8)
    assert result.charged_budgets == (1.0 if bool(prompt.plan.reusable().any()) else 0.0,)


@settings(max_examples=30)
@given(blends(seed=1), blends(seed=2), st.sampled_from([Gradual, Asking]))
def test_a_batch_gives_each_prompt_what_it_gets_alone(one, two, policy):
    together = run([one[0], two[0]], [one[1], two[1]], policy())
    start = 0
    for index, (ids, prompt) in enumerate((one, two)):
        alone = run([ids], [prompt], policy())
        torch.testing.assert_close(together.output[index], alone.output[0], rtol=1e-8, atol=1e-8)
        assert together.plans[index] == alone.plans[0]
        assert together.charged_budgets[index] == pytest.approx(alone.charged_budgets[0])
        for ours, theirs in zip(together.keys, alone.keys, strict=True):
            torch.testing.assert_close(ours[start : start + len(ids)], theirs, rtol=1e-8, atol=1e-8)
        start += len(ids)


def two_passages() -> tuple[torch.Tensor, BlendPrompt]:
    """[4 new][passage of 20, cached at 0][3 new][passage of 16, cached at 50][7 new]."""
    first, second = ids_of(20, 1), ids_of(16, 2)
    ids = torch.cat([ids_of(4, 3), first, ids_of(3, 4), second, ids_of(7, 5)])
    sources = [Stored(MODEL.prefill(first)[1]), Stored(MODEL.prefill(second, start=50)[1])]
    plan = BlendPlan.of(len(ids), [ReusedSpan(4, 24, 0), ReusedSpan(27, 43, 1, old_start=50)])
    return ids, BlendPrompt(plan, sources, ratio=0.25)


def test_gradual_filtering_keeps_what_the_wider_forwards_computed():
    """What was computed up to a check layer is right there; throwing it away would be a fault of its own."""
    ids, prompt = two_passages()
    result = run([ids], [prompt], Gradual())
    exact = MODEL.prefill(ids)[1]
    for layer in (0, 1):  # every row was computed here
        torch.testing.assert_close(result.keys[layer], exact[layer].k, rtol=1e-8, atol=1e-8)
    second = round(36 * 0.6) + 14
    assert int(result.plans[0].forced().sum()) == 14
    computed = sum(r.end - r.start for r in result.plans[0].ranges() if r.reason is Reason.SELECTED)
    assert computed == 9
    # All of R at layers 0 and 1, 60 % of it at layer 2, 25 % at layer 3.
    assert result.charged_budgets[0] == pytest.approx((36 + 36 + (second - 14) + 9) / (36 * LAYERS))


def test_deviation_is_the_squared_distance_between_fresh_and_moved():
    ids, prompt = two_passages()
    seen: dict[str, torch.Tensor] = {}

    class Look(SelectionPolicy):
        name = "look"

        def select(self, context: SelectionContext) -> torch.Tensor:
            seen.update({tensor: context.deviation(1, tensor) for tensor in ("k", "v", "kv")})
            return context.forced

    run([ids], [prompt], Look())
    exact, stale = MODEL.prefill(ids)[1][1], moved(ids, prompt)[1]
    reusable = prompt.plan.reusable()
    by_hand = {
        "k": (exact.k - stale.k).square().sum((1, 2))[reusable],
        "v": (exact.v - stale.v).square().sum((1, 2))[reusable],
    }
    by_hand["kv"] = by_hand["k"] / by_hand["k"].mean() + by_hand["v"] / by_hand["v"].mean()
    for tensor, expected in by_hand.items():
        torch.testing.assert_close(seen[tensor][reusable].double(), expected, rtol=1e-4, atol=1e-4)
        assert bool(seen[tensor][~reusable].isneginf().all())


def test_the_question_scores_by_the_attention_that_it_pays():
    ids, prompt = two_passages()
    # By hand: the new tokens through the model, over the moved KV; the last 4 of them look.
    weights: list[torch.Tensor] = []
    new = torch.nonzero(prompt.plan.forced())[:, 0]
    stale = moved(ids, prompt)

    def attend(layer_id, q, k, v, *, scale, **_):
        keys, values = stale[layer_id].k.clone(), stale[layer_id].v.clone()
        keys[new], values[new] = k, v
        heads = keys.repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q, heads) * scale
        scores = scores.masked_fill(torch.arange(len(ids))[None, :] > new[:, None], -torch.inf).softmax(-1)
        weights.append(scores[:, -4:].mean(1))
        return torch.einsum("hqk,khd->qhd", scores, values.repeat_interleave(2, 1))

    MODEL.run(ids[new], new, attend)
    for options, expected in (
        ({}, torch.stack(weights).mean((0, 1))),
        ({"layers": [2, 3]}, torch.stack(weights[2:]).mean((0, 1))),
        ({"heads": "max", "layers": [1]}, weights[1].amax(0)),
    ):
        policy = Asking(**options)
        run([ids], [prompt], policy)
        torch.testing.assert_close(policy.scores.double(), expected, rtol=1e-4, atol=1e-6)


def test_of_many_new_tokens_the_question_sees_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out has no KV yet: nothing of it may be looked at, whatever a policy asked before."""
    monkeypatch.setattr("lmcache.blend.blend_pass._MAX_SCORING_ROWS", 9)
    monkeypatch.setattr("lmcache.blend.blend_pass._SCORING_HEAD_ROWS", 3)
    ids, prompt = two_passages()  # new: 0-3, 24-26, 43-49

    class AsksTwice(Asking):
        def select(self, context: SelectionContext) -> torch.Tensor:
            if self.options.pop("look_first"):
                context.deviation(1)
            return super().select(context)

    received = []
    for look_first in (False, True):
        policy = AsksTwice(layers=[3], look_first=look_first)
        host = TinyHost(MODEL, [ids])
        blend(host, [prompt], ROPES, policy, AsItIs())
        assert host.forwards[int(look_first)].tolist() == [0, 1, 2, 44, 45, 46, 47, 48, 49]
        assert policy.scores[[3, 24, 25, 26, 43]].tolist() == [0.0] * 5
        received.append(policy.scores)
    assert received[0].sum() == pytest.approx(1.0)
    assert received[1].sum() == pytest.approx(1.0)


def test_the_question_is_asked_only_as_deep_as_it_is_scored():
    ids, prompt = two_passages()
    host = TinyHost(MODEL, [ids])
    depth: list[int] = []
    original = MODEL.run

    class Counting(TinyModel):
        def run(self, ids, positions, attend):
            def counted(layer_id, *args, **kwargs):
                depth.append(layer_id)
                return attend(layer_id, *args, **kwargs)

            return original(ids, positions, counted)

    host.model = Counting()
    blend(host, [prompt], ROPES, Asking(layers=[0, 1]), AsItIs())
    assert depth == [0, 1, 0, 1, 2, 3]


class Early(SelectionPolicy):
    """Some rows are chosen before it looks, others by what it sees."""

    name = "early"

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)

    def select(self, context: SelectionContext) -> torch.Tensor:
        early = torch.zeros_like(context.forced)
        early[self.rows] = True
        return context.choose(context.attention_received(span=4, layers=[1], computed=early), already=early)


def corrected(layers: Sequence[LayerKVPair], rows: torch.Tensor) -> list[LayerKVPair]:
    """What :class:`AddOne` makes of them."""
    return [LayerKVPair(pair.k + rows[:, None, None].to(pair.k.dtype), pair.v) for pair in layers]


@pytest.mark.parametrize("max_rows", [None, 7])
def test_what_is_computed_while_a_policy_looks_stays_and_is_not_computed_again(max_rows: int | None) -> None:
    ids, prompt = two_passages()
    early = [8, 16, 32]
    host = TinyHost(MODEL, [ids])
    corrector = AddOne()
    result = blend(host, [prompt], ROPES, Early(early), corrector, max_rows=max_rows)
    new = torch.nonzero(prompt.plan.forced())[:, 0].tolist()
    chosen = [token for r in result.plans[0].selected for token in range(*r)]
    assert len(chosen) == 9  # the budget counts both
    late = sorted({*new, *chosen} - {*early})
    assert set(early) < set(chosen)
    forwards = torch.cat(host.forwards).tolist()
    assert forwards == sorted({*new, *early}) + late

    # By definition: two forwards, the second over what the first has left. Both correct what nobody computes.
    reusable = prompt.plan.reusable()
    computed = torch.zeros(len(ids), dtype=torch.bool)
    computed[[*new, *early]] = True
    _, first = MODEL.blend(ids, computed, corrected(moved(ids, prompt), reusable))
    not_early = reusable.clone()
    not_early[early] = False
    computed[:] = False
    computed[late] = True
    logits, kv = MODEL.blend(ids, computed, corrected(first, not_early))
    torch.testing.assert_close(result.output[0], logits, rtol=1e-8, atol=1e-8)
    for layer, pair in enumerate(kv):
        torch.testing.assert_close(result.keys[layer], pair.k, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(result.values[layer], pair.v, rtol=1e-8, atol=1e-8)
    if max_rows is None:
        first_seen = [(layer, len(new) + len(early)) for layer in range(LAYERS)]
        then_seen = [(layer, len(late) + len(early)) for layer in range(LAYERS)]
        assert corrector.seen == [*first_seen, *then_seen]
    assert result.charged_budgets[0] == pytest.approx(9 / 36)


def test_nothing_is_computed_early_where_new_tokens_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not see them, and be wrong for good."""
    monkeypatch.setattr("lmcache.blend.blend_pass._MAX_SCORING_ROWS", 9)
    monkeypatch.setattr("lmcache.blend.blend_pass._SCORING_HEAD_ROWS", 3)
    ids, prompt = two_passages()
    corrector = AddOne()
    host = TinyHost(MODEL, [ids])
    result = blend(host, [prompt], ROPES, Early([8, 16]), corrector)
    assert host.forwards[0].tolist() == [0, 1, 2, 44, 45, 46, 47, 48, 49]
    assert corrector.seen == [(layer, 14 + 9) for layer in range(LAYERS)]
    computed = torch.zeros(len(ids), dtype=torch.bool)
    for r in result.plans[0].ranges():
        computed[r.start : r.end] = r.reason.computed
    logits, _ = MODEL.blend(ids, computed, corrected(moved(ids, prompt), prompt.plan.reusable()))
    torch.testing.assert_close(result.output[0], logits, rtol=1e-8, atol=1e-8)


def test_the_corrector_sees_each_layer_once_and_never_changes_what_is_computed_or_exact():
    ids, prompt = two_passages()
    corrector = AddOne()
    result = run([ids], [prompt], Chosen([5, 30]), corrector)
    assert corrector.seen == [(layer, 16) for layer in range(LAYERS)]
    computed = torch.zeros(len(ids), dtype=torch.bool)
    for r in result.plans[0].ranges():
        computed[r.start : r.end] = r.reason.computed
    stale = [LayerKVPair(pair.k + 1.0, pair.v) for pair in moved(ids, prompt)]
    logits, kv = MODEL.blend(ids, computed, stale)
    torch.testing.assert_close(result.output[0], logits, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result.keys[2], kv[2].k, rtol=1e-8, atol=1e-8)
    # With gradual filtering: nothing to correct where every row is fresh, and once in the layers after.
    corrector = AddOne()
    run([ids], [prompt], Gradual(), corrector)
    assert [layer for layer, _ in corrector.seen] == [2, 3]


def test_no_hits_at_all_is_a_full_prefill_without_asking_the_policy():
    ids = ids_of(30)
    host = TinyHost(MODEL, [ids])
    result = blend(host, [BlendPrompt(BlendPlan(30))], ROPES, Asking(), AsItIs())
    torch.testing.assert_close(result.output[0], MODEL.prefill(ids)[0], rtol=1e-8, atol=1e-8)
    assert len(host.forwards) == 1
    assert result.fallbacks == (None,)


@pytest.mark.parametrize("policy", [Chosen(), Asking(), Gradual()], ids=lambda policy: policy.name)
def test_a_prompt_that_is_cached_whole_still_computes_its_last_token(policy):
    ids = ids_of(25)
    prompt = BlendPrompt(BlendPlan.of(25, [ReusedSpan(0, 25, 0)]), [Stored(MODEL.prefill(ids)[1])], ratio=0.0)
    result = run([ids], [prompt], policy)
    torch.testing.assert_close(result.output[0], MODEL.prefill(ids)[0], rtol=1e-6, atol=1e-6)


def test_an_exact_prefix_is_taken_as_it_is_and_never_computed():
    prefix, rest = ids_of(12, 1), ids_of(9, 2)
    ids = torch.cat([prefix, rest])
    exact = Stored(MODEL.prefill(prefix)[1])
    plan = BlendPlan.of(21, [ReusedSpan(0, 12, 0, exact=True), ReusedSpan(14, 18, 1, old_start=3)])
    prompt = BlendPrompt(plan, [exact, Stored(MODEL.prefill(rest[2:6], start=3)[1])])
    host = TinyHost(MODEL, [ids])
    result = blend(host, [prompt], ROPES, Everything(), AddOne())
    torch.testing.assert_close(result.output[0], MODEL.prefill(ids)[0], rtol=1e-8, atol=1e-8)
    assert all(int(rows.min()) >= 12 for rows in host.forwards)
    assert torch.equal(result.keys[1][:12], exact.kv[1].k)


@pytest.mark.parametrize("fails_at", range(LAYERS))
@pytest.mark.parametrize("policy", [Earliest(), Asking(), Gradual()], ids=lambda policy: policy.name)
def test_a_load_that_fails_in_the_middle_becomes_a_full_prefill(fails_at, policy):
    ids, prompt = two_passages()
    broken = BlendPrompt(prompt.plan, [prompt.sources[0], Stored(prompt.sources[1].kv, fails_at=fails_at)], 0.25)
    good_ids, good = ids_of(19, 9), BlendPrompt(BlendPlan.of(19, [ReusedSpan(2, 12, 0)]), [prompt.sources[0]], 0.25)
    result = run([ids, good_ids], [broken, good], policy)
    logits, kv = MODEL.prefill(ids)
    torch.testing.assert_close(result.output[0], logits, rtol=1e-8, atol=1e-8)
    for layer in range(LAYERS):
        torch.testing.assert_close(result.keys[layer][: len(ids)], kv[layer].k, rtol=1e-8, atol=1e-8)
    assert result.fallbacks == (f"layer {fails_at} was lost", None)
    # The other prompt of the batch is still blended.
    alone = run([good_ids], [good], policy)
    torch.testing.assert_close(result.output[1], alone.output[0], rtol=1e-8, atol=1e-8)
    assert result.plans[1] == alone.plans[0]


def test_kv_of_another_shape_is_a_failed_load():
    ids, prompt = two_passages()
    wrong = Stored([LayerKVPair(pair.k[:, :1], pair.v) for pair in prompt.sources[0].kv])
    result = run([ids], [BlendPrompt(prompt.plan, [wrong, prompt.sources[1]])], Chosen())
    torch.testing.assert_close(result.output[0], MODEL.prefill(ids)[0], rtol=1e-8, atol=1e-8)
    assert "[20, 1, 16]" in str(result.fallbacks[0])


def test_layers_may_arrive_one_by_one_while_the_model_runs():
    ids, prompt = two_passages()
    reached = [threading.Event() for _ in range(LAYERS + 1)]
    arrived = [threading.Event() for _ in range(LAYERS)]

    class Arriving(Stored):
        def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
            reached[layer_id].set()
            assert arrived[layer_id].wait(30)
            return super().layer(layer_id)

    def deliver() -> None:
        # Layer l + 1 is delivered only once the model is waiting for it: it must have run layer l by then.
        for asked, done in zip(reached, arrived, strict=False):
            assert asked.wait(30)
            done.set()

    thread = threading.Thread(target=deliver)
    thread.start()
    result = run([ids], [BlendPrompt(prompt.plan, [Arriving(s.kv) for s in prompt.sources], 0.25)], Chosen([7]))
    thread.join()
    check(result, ids, prompt)


def test_corrupted_kv_changes_the_answer():
    """The negative control of every test above: the reused KV is really what is looked at."""
    ids, prompt = two_passages()
    generator = torch.Generator().manual_seed(0)
    noise = [
        LayerKVPair(
            torch.randn(p.k.shape, generator=generator).double(), torch.randn(p.v.shape, generator=generator).double()
        )
        for p in prompt.sources[0].kv
    ]
    good = run([ids], [prompt], Chosen())
    bad = run([ids], [BlendPrompt(prompt.plan, [Stored(noise), prompt.sources[1]])], Chosen())
    assert float((good.output - bad.output).abs().max()) > 0.1


def test_says_what_is_wrong():
    ids, prompt = two_passages()
    with pytest.raises(ValueError, match="only 1 sources"):
        BlendPrompt(prompt.plan, prompt.sources[:1])
    with pytest.raises(ValueError, match="holds only 16"):
        BlendPrompt(prompt.plan, [prompt.sources[1], prompt.sources[1]])
    with pytest.raises(ValueError, match=r"ratio=1.5"):
        BlendPrompt(prompt.plan, prompt.sources, 1.5)
    with pytest.raises(ValueError, match="at least one prompt"):
        blend(TinyHost(MODEL, [ids]), [], ROPES, Chosen(), AsItIs())
    with pytest.raises(ValueError, match="each of 4 layers, got 3"):
        blend(TinyHost(MODEL, [ids]), [prompt], ROPES[:3], Chosen(), AsItIs())
