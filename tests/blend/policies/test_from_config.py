from __future__ import annotations

import pytest
import torch

from lmcache.blend.correctors.key_shift import KeyShiftCorrector
from lmcache.blend.correctors.local_key_shift import LocalKeyShiftCorrector
from lmcache.blend.from_config import make_corrector_from_config, make_policy_from_config, recompute_ratio
from lmcache.blend.policies import POLICIES
from lmcache.blend.policies.kv_deviation import KVDeviationPolicy
from lmcache.config import LMCacheEngineConfig
from tests.blend.policies.batches import Prompt, context_of, probe_of

PROMPT = Prompt((("exact", 2), ("moved", 40), ("new", 3)), ratio=0.2)


def config_of(**values: object) -> LMCacheEngineConfig:
    return LMCacheEngineConfig.from_defaults(**values)


def test_the_default_is_what_measured_best() -> None:
    assert make_policy_from_config(config_of()).name == "sampled_attention"
    assert make_corrector_from_config(config_of()).name == "kriging"


def test_kv_deviation_is_cacheblend_as_in_the_paper() -> None:
    policy = make_policy_from_config(config_of(blend_policy="kv_deviation"))
    context, same = context_of(PROMPT), context_of(PROMPT)
    assert torch.equal(policy.select(context), KVDeviationPolicy(check_layers=(1,)).select(same))
    assert recompute_ratio(config_of()) == 0.15


@pytest.mark.parametrize("name", POLICIES.builtin)
def test_every_policy_by_its_name(name: str) -> None:
    assert make_policy_from_config(config_of(blend_policy=name)).name == name


def test_check_layers_and_their_ratios() -> None:
    config = config_of(blend_policy="KV-Deviation", blend_check_layers=(1, 4), blend_recompute_ratios=(0.4, 0.2))
    context = context_of(PROMPT)
    make_policy_from_config(config).select(context)
    assert [asked["layer"] for asked in probe_of(context).asked] == [1, 4]
    assert int((probe_of(context).looked_at[1] & context.reusable).sum()) == 16
    assert recompute_ratio(config) == 0.2


def test_thresholds() -> None:
    config = config_of(blend_policy="kv_deviation", blend_thresholds=(1.5,))
    context = context_of(PROMPT)
    deviation = probe_of(context).deviations[1]
    expected = context.reusable & (deviation > 1.5 * deviation[2:42].mean())
    assert torch.equal(make_policy_from_config(config).select(context) & context.reusable, expected)


def test_thresholds_with_another_policy_are_refused() -> None:
    config = config_of(blend_policy="sink", blend_thresholds=(1.0,))
    with pytest.raises(ValueError, match=r"blend_thresholds=\[1.0\]: only blend_policy='kv_deviation' .*not 'sink'"):
        make_policy_from_config(config)


def test_options_of_a_policy() -> None:
    config = config_of(
        blend_policy="query_attention", extra_config={"blend_policy_options": {"span": 3, "layers": [4, 5]}}
    )
    context = context_of(PROMPT)
    make_policy_from_config(config).select(context)
    assert probe_of(context).asked == [{"span": 3, "layers": [4, 5], "heads": "mean"}]


def test_an_option_of_its_own_wins_over_the_configuration() -> None:
    config = config_of(blend_policy="kv_deviation", extra_config={"blend_policy_options": {"tensor": "k"}})
    context = context_of(PROMPT)
    make_policy_from_config(config).select(context)
    assert probe_of(context).asked == [{"layer": 1, "tensor": "k"}]


def test_correctors() -> None:
    assert isinstance(make_corrector_from_config(config_of(blend_corrector="Key-Shift")), KeyShiftCorrector)
    config = config_of(blend_corrector="local_key_shift", extra_config={"blend_corrector_options": {"width": 5}})
    assert isinstance(make_corrector_from_config(config), LocalKeyShiftCorrector)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blend_policy": "kv"}, "unknown selection policy 'kv': must be one of none, "),
        ({"extra_config": {"blend_policy_options": [1]}}, r"extra_config\['blend_policy_options'\]=\[1\]: must be"),
        ({"extra_config": {"blend_policy_options": {"k": 1}}}, "its options: sample, at_most, span, layers, heads"),
    ],
)
def test_a_bad_policy_is_refused_in_words(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy_from_config(config_of(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blend_corrector": "shift"}, "unknown corrector 'shift': must be one of none, key_shift, "),
        (
            {"extra_config": {"blend_corrector_options": "wide"}},
            r"extra_config\['blend_corrector_options'\]='wide': must be a mapping",
        ),
    ],
)
def test_a_bad_corrector_is_refused_in_words(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_corrector_from_config(config_of(**values))
