"""Public import path; see :mod:`lmcache.manager`."""

from lmcache.manager import LMCacheManager

__all__ = ["LMCacheManager"]
