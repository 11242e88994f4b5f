"""Selection policies, by the names of the ``blend_policy`` option.

Another distribution adds its own through the entry-point group ``lmcache.blend_policies``::

    [project.entry-points."lmcache.blend_policies"]
    my_policy = "my_package:MyPolicy"
"""

from __future__ import annotations

from typing import Any

from lmcache.blend.plugins import PluginRegistry
from lmcache.blend.policies.boundary import BoundaryPolicy
from lmcache.blend.policies.full import FullPolicy
from lmcache.blend.policies.hybrid import HybridPolicy
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.policies.kv_deviation import KVDeviationPolicy
from lmcache.blend.policies.none import NonePolicy
from lmcache.blend.policies.query_attention import QueryAttentionPolicy
from lmcache.blend.policies.random_choice import RandomPolicy
from lmcache.blend.policies.sampled_attention import SampledAttentionPolicy
from lmcache.blend.policies.sink import SinkPolicy

POLICIES: PluginRegistry[SelectionPolicy] = PluginRegistry(
    "selection policy",
    "lmcache.blend_policies",
    SelectionPolicy,
    (
        NonePolicy,
        FullPolicy,
        RandomPolicy,
        SinkPolicy,
        BoundaryPolicy,
        KVDeviationPolicy,
        QueryAttentionPolicy,
        HybridPolicy,
        SampledAttentionPolicy,
    ),
)


def make_policy(name: str, /, **options: Any) -> SelectionPolicy:
    """A policy by its name; ``options`` are its constructor's.

    Raises:
        ValueError: the name or an option is unknown, an option's value is bad, or what another distribution installed
            under the name cannot be used.
    """
    return POLICIES.make(name, **options)


def policy_names() -> list[str]:
    """Every name that :func:`make_policy` takes: ours, then those that other distributions installed."""
    return POLICIES.names()
