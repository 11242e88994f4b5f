"""Public import path; see :mod:`lmcache.config`."""

from lmcache.config import LMCacheEngineConfig

__all__ = ["LMCacheEngineConfig"]
