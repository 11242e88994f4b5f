"""The policy and the corrector that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcache.blend.correctors import make_corrector
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.plugins import canonical
from lmcache.blend.policies import make_policy
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.policies.kv_deviation import KVDeviationPolicy
from lmcache.config import LMCacheEngineConfig


def make_policy_from_config(config: LMCacheEngineConfig) -> SelectionPolicy:
    """The policy ``blend_policy``, with the options in ``extra_config["blend_policy_options"]``.

    ``kv_deviation`` takes its check layers, ratios and thresholds from the configuration's own keys. A prompt's ratio
    is :func:`recompute_ratio`, whatever the policy.

    Raises:
        ValueError: the policy or an option is unknown, or an option's value is bad.
    """
    options = _options(config, "blend_policy_options")
    if canonical(config.blend_policy) == KVDeviationPolicy.name:
        options = {
            "check_layers": config.blend_check_layers,
            "ratios": config.blend_recompute_ratios,
            "thresholds": config.blend_thresholds,
            **options,
        }
    elif config.blend_thresholds is not None:
        raise ValueError(
            f"blend_thresholds={list(config.blend_thresholds)}: only blend_policy='kv_deviation' knows thresholds, "
            f"not {config.blend_policy!r}; leave them unset"
        )
    return make_policy(config.blend_policy, **options)


def make_corrector_from_config(config: LMCacheEngineConfig) -> Corrector:
    """The corrector ``blend_corrector``, with the options in ``extra_config["blend_corrector_options"]``.

    Raises:
        ValueError: the corrector or an option is unknown, or an option's value is bad.
    """
    return make_corrector(config.blend_corrector, **_options(config, "blend_corrector_options"))


def recompute_ratio(config: LMCacheEngineConfig) -> float:
    """The share of reused tokens that is recomputed in the end: the ratio of the last check layer."""
    return config.blend_recompute_ratios[-1]


def _options(config: LMCacheEngineConfig, key: str) -> dict[str, Any]:
    options = config.extra_config.get(key, {})
    if not isinstance(options, Mapping):
        raise ValueError(f"extra_config[{key!r}]={options!r}: must be a mapping of option names to values")
    return dict(options)
