"""The disk tier: bounded, restart-safe, crash-safe."""

from lmcache.storage.disk.settings import DiskSettings, DiskTierError
from lmcache.storage.disk.tier import LocalDiskTier

__all__ = ["DiskSettings", "DiskTierError", "LocalDiskTier"]
