"""Public import path; see :mod:`lmcache.cache_engine` and :mod:`lmcache.engine_builder`."""

from lmcache.cache_engine import EngineStats, LMCacheEngine
from lmcache.engine_builder import LMCacheEngineBuilder

__all__ = ["EngineStats", "LMCacheEngine", "LMCacheEngineBuilder"]
