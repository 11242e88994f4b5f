"""The public paths that users and engines import by."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("path", "name", "home"),
    [
        ("lmcache.v1.cache_engine", "LMCacheEngine", "lmcache.cache_engine"),
        ("lmcache.v1.cache_engine", "LMCacheEngineBuilder", "lmcache.engine_builder"),
        ("lmcache.v1.config", "LMCacheEngineConfig", "lmcache.config"),
        ("lmcache.v1.metadata", "LMCacheEngineMetadata", "lmcache.metadata"),
        ("lmcache.v1.manager", "LMCacheManager", "lmcache.manager"),
        ("lmcache.v1.gpu_connector", "GPUConnectorInterface", "lmcache.paging.interface"),
        ("lmcache.v1.memory_management", "MemoryObj", "lmcache.memory.memory_obj"),
        ("lmcache.logging", "init_logger", "lmcache.observability.logging"),
    ],
)
def test_public_path(path, name, home):
    assert getattr(importlib.import_module(path), name) is getattr(importlib.import_module(home), name)
