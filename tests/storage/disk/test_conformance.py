"""The disk tier does what every tier does."""

from __future__ import annotations

from pathlib import Path

from lmcache.storage.disk import DiskSettings, LocalDiskTier
from lmcache.storage.disk.space import ENTRY_METADATA_BYTES, FIXED_BYTES, SpaceRules
from lmcache.storage.interface import Allocate
from lmcache.storage.policies.lru import LRUPolicy
from tests.storage.conformance import SPEC, BoundedTierConformance


class TestLocalDiskTier(BoundedTierConformance):
    entry_overhead = SpaceRules(Path("/"), FIXED_BYTES).charge(SPEC.nbytes) + ENTRY_METADATA_BYTES - SPEC.nbytes

    def make_tier(self, tmp_path: Path, capacity_bytes: int, allocate: Allocate) -> LocalDiskTier:
        settings = DiskSettings(tmp_path / "kv", FIXED_BYTES + capacity_bytes)
        return LocalDiskTier(settings, allocate, LRUPolicy())
