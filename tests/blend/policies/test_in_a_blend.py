"""Every policy and corrector in a real blend, of a small model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmcache.blend.blend_pass import BlendResult, blend
from lmcache.blend.correctors import CORRECTORS, make_corrector
from lmcache.blend.policies import POLICIES, make_policy
from lmcache.blend.policies.interface import SelectionPolicy
from tests.blend.core.test_blend import MODEL, ROPES, two_passages
from tests.blend.core.tiny_model import LAYERS, TinyHost

CASES = [
    *((name, {}) for name in POLICIES.builtin),
    ("kv_deviation", {"tensor": "kv"}),
    ("kv_deviation", {"check_layers": [0, 1, 2], "tensor": "k", "ratios": [0.9, 0.6, 0.3]}),
    ("kv_deviation", {"check_layers": [1, 2], "thresholds": [0.5, 0.5]}),
    ("query_attention", {"span": 3, "layers": "late", "heads": "max"}),
]


def blended(policy: SelectionPolicy, corrector: str, ratio: float) -> BlendResult[torch.Tensor]:
    ids, prompt = two_passages()
    return blend(TinyHost(MODEL, [ids]), [replace(prompt, ratio=ratio)], ROPES, policy, make_corrector(corrector))


@pytest.mark.parametrize("corrector", list(CORRECTORS.builtin))
@pytest.mark.parametrize(("name", "options"), CASES)
def test_ratio_1_is_a_full_prefill(name: str, options: dict[str, object], corrector: str) -> None:
    ids, _ = two_passages()
    result = blended(make_policy(name, **options), corrector, 1.0)
    full, _ = MODEL.prefill(ids)
    if name == "none":
        assert not torch.allclose(result.output[0], full, atol=1e-3)
        assert result.charged_budgets == (0.0,)
    else:
        torch.testing.assert_close(result.output[0], full, rtol=1e-6, atol=1e-6)
        assert result.charged_budgets == (1.0,)


@pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if case[0] not in ("none", "full") and "thresholds" not in case[1]]
)
def test_is_charged_what_its_ratio_is_for(name: str, options: dict[str, object]) -> None:
    policy = make_policy(name, **options)
    result = blended(policy, "key_shift", policy.ratio_for(0.8, LAYERS))
    assert result.charged_budgets[0] == pytest.approx(0.8, abs=0.5 / 36)
    assert result.plans[0].policy == name


@pytest.mark.parametrize("corrector", ["key_shift", "local_key_shift"])
def test_correcting_changes_keys_that_are_not_recomputed_and_nothing_else(corrector: str) -> None:
    policy = make_policy("sink", k=4)
    plain, corrected = blended(policy, "none", 0.2), blended(policy, corrector, 0.2)
    assert corrected.plans == plain.plans
    kept = torch.tensor([not r.reason.computed for r in plain.plans[0].ranges() for _ in range(r.start, r.end)])
    for layer in range(1, LAYERS):  # at layer 0 fresh and moved keys are the same
        change = (corrected.keys[layer] - plain.keys[layer]).abs().amax((1, 2))
        assert bool((change[kept] > 1e-3).all())
    torch.testing.assert_close(corrected.keys[0], plain.keys[0])
    torch.testing.assert_close(corrected.values[1][kept], plain.values[1][kept], rtol=0, atol=0)
