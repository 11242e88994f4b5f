"""Every option of the cache, read in one place."""

from lmcache.config.schema import LMCacheEngineConfig

__all__ = ["LMCacheEngineConfig"]
