"""Every architecture: what a blend computes is what the model computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lmcache.blend.batch import BlendPrompt
from lmcache.blend.blend_pass import BlendResult, blend
from lmcache.blend.correctors import make_corrector
from lmcache.blend.plan import BlendPlan, Reason, ReusedSpan
from lmcache.blend.policies import make_policy
from lmcache.integration.transformers import BlendedPrompt, CacheBlend
from lmcache.integration.transformers.host import TransformersHost, TransformersModel
from lmcache.integration.transformers.supported import supported_ropes
from tests.transformers.small_models import (
    CONFIGS,
    WINDOW,
    Prefill,
    continuation,
    own_continuation,
    own_prefill,
    random_ids,
    small_model,
)

SYSTEM, DOC_A, DOC_B, QUESTION = (random_ids(count, seed) for seed, count in enumerate((7, 18, 15, 9)))
PROMPT = [SYSTEM, DOC_B, DOC_A, QUESTION]
IDS = torch.cat(PROMPT)
assert len(IDS) > 2 * WINDOW

pytestmark = pytest.mark.parametrize("name", CONFIGS)


def assert_equal_prefill(ours: BlendedPrompt, theirs: Prefill, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours.logits, theirs.logits, atol=tolerance, rtol=0)
    for layer in range(len(theirs.keys)):
        torch.testing.assert_close(ours.keys[layer], theirs.keys[layer], atol=tolerance, rtol=0)
        torch.testing.assert_close(ours.values[layer], theirs.values[layer], atol=tolerance, rtol=0)


def test_full_policy_equals_full_prefill_and_goes_on_equally(name: str) -> None:
    model = small_model(name)
    with CacheBlend(model) as blend_:
        for passage in (DOC_A, DOC_B):
            assert blend_.cache(passage, behind=SYSTEM)
        result = blend_.prefill(PROMPT, policy="full")
    assert result.report.charged_budget == 1
    assert any(part.reason is Reason.SELECTED for part in result.plan.ranges())
    assert_equal_prefill(result, own_prefill(model, IDS))
    expected = own_continuation(model, IDS, 24)
    assert torch.equal(continuation(model, result, 24), expected)
    assert len(expected.unique()) > 2, "a model that repeats itself shows nothing"


def test_query_attention_at_ratio_one_equals_full_prefill(name: str) -> None:
    model = small_model(name)
    with CacheBlend(model, policy="query_attention", ratio=1.0) as blend_:
        blend_.cache(DOC_A)
        blend_.cache(DOC_B)
        assert_equal_prefill(blend_.prefill(PROMPT), own_prefill(model, IDS))


def test_nothing_cached_is_a_full_prefill(name: str) -> None:
    model = small_model(name)
    with CacheBlend(model) as blend_:
        result = blend_.prefill(PROMPT)
    assert {part.reason for part in result.plan.ranges()} <= {Reason.NOT_CACHED, Reason.SUFFIX}
    assert_equal_prefill(result, own_prefill(model, IDS))


def test_everything_cached_computes_the_last_token_only(name: str) -> None:
    model = small_model(name)
    whole = own_prefill(model, IDS)
    with CacheBlend(model) as blend_:
        for index, part in enumerate(PROMPT):
            blend_.cache(part, behind=torch.cat([IDS[:0], *PROMPT[:index]]))
        result = blend_.prefill(PROMPT, policy="none")
        computed = [part for part in result.plan.ranges() if part.reason.computed]
        assert [(part.start, part.end) for part in computed] == [(len(IDS) - 1, len(IDS))]
        assert torch.isfinite(result.logits).all()
        if name != "phi3-longrope":  # there, KV of a shorter prompt is none of this one
            assert_equal_prefill(result, whole)


def test_moved_keys_of_the_first_layer_are_those_of_the_new_place(name: str) -> None:
    """They do not depend on context, so moving must give exactly what computing does; values do not move at all."""
    model = small_model(name)
    whole = own_prefill(model, IDS)
    moved = slice(len(SYSTEM) + len(DOC_B), len(SYSTEM) + len(DOC_B) + len(DOC_A))
    with CacheBlend(model) as blend_:
        blend_.cache(DOC_A)
        result = blend_.prefill(PROMPT, policy="none", corrector="none")
    assert [part.reason for part in result.plan.ranges() if part.start == moved.start] == [Reason.MOVED]
    torch.testing.assert_close(result.keys[0][moved], whole.keys[0][moved], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.values[0][moved], whole.values[0][moved], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(result.values[-1][moved], whole.values[-1][moved], atol=1e-2)


class Held:
    """The KV of a whole prompt as a source."""

    def __init__(self, prefill: Prefill, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.keys = [k + noise * torch.randn(k.shape, generator=generator) for k in prefill.keys]
        self.values = [v + noise * torch.randn(v.shape, generator=generator) for v in prefill.values]
        self.num_tokens = self.length = len(self.keys[0])

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[layer_id], self.values[layer_id]


def blend_scattered(model: Any, source: Held, prompts: Sequence[torch.Tensor] = (IDS,)) -> BlendResult[torch.Tensor]:
    """A third of the rows, drawn by lot, are computed; all others' KV is the source's."""
    planned = []
    for ids in prompts:
        span = ReusedSpan(0, len(ids), source=0, old_start=0)
        planned.append(BlendPrompt(BlendPlan(len(ids), (span,)), [source], ratio=0.3))
    return blend(
        TransformersHost(TransformersModel(model), prompts),
        planned,
        supported_ropes(model),
        make_policy("random"),
        make_corrector("none"),
    )


def test_scattered_rows_behind_right_kv_give_the_same_as_all(name: str) -> None:
    model = small_model(name)
    whole = own_prefill(model, IDS)
    result = blend_scattered(model, Held(whole))
    assert len(result.plans[0].selected) > 3
    torch.testing.assert_close(result.output[0], whole.logits, atol=1e-4, rtol=0)
    for layer in range(len(whole.keys)):
        torch.testing.assert_close(result.keys[layer], whole.keys[layer], atol=1e-4, rtol=0)
        torch.testing.assert_close(result.values[layer], whole.values[layer], atol=1e-4, rtol=0)


def test_wrong_kv_is_seen(name: str) -> None:
    model = small_model(name)
    whole = own_prefill(model, IDS)
    result = blend_scattered(model, Held(whole, noise=1.0))
    assert (result.output[0] - whole.logits).abs().max() > 0.05 * whole.logits.abs().max()
