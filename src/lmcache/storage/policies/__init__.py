"""Eviction policies, by the names of the ``cache_policy`` option."""

from __future__ import annotations

from typing import Any

from lmcache.storage.policies.fifo import FIFOPolicy
from lmcache.storage.policies.interface import EvictionPolicy, K
from lmcache.storage.policies.lfu import LFUPolicy
from lmcache.storage.policies.lru import LRUPolicy
from lmcache.storage.policies.s3fifo import S3FIFOPolicy

POLICIES: dict[str, type[EvictionPolicy[Any]]] = {
    policy.name: policy for policy in (LRUPolicy, LFUPolicy, FIFOPolicy, S3FIFOPolicy)
}


def make_policy(name: str) -> EvictionPolicy[K]:
    """A new, empty policy.

    Raises:
        ValueError: no policy has that name; upper and lower case do not matter.
    """
    policy = POLICIES.get(name.upper())
    if policy is None:
        raise ValueError(f"unknown eviction policy {name!r}: must be one of {', '.join(POLICIES)}")
    return policy()
