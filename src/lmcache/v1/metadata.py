"""Public import path; see :mod:`lmcache.metadata`."""

from lmcache.metadata import LMCacheEngineMetadata

__all__ = ["LMCacheEngineMetadata"]
