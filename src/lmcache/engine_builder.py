"""``LMCacheEngineBuilder``: engines by name, for callers that cannot pass one around."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.manager import LMCacheManager
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.paging.interface import GPUConnectorInterface


@dataclass(frozen=True)
class _Built:
    manager: LMCacheManager
    arguments: dict[str, Any]


class LMCacheEngineBuilder:
    """The engines of this process. Thread-safe."""

    _built: ClassVar[dict[str, _Built]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def get_or_create(
        cls,
        instance_id: str,
        config: LMCacheEngineConfig,
        metadata: LMCacheEngineMetadata,
        gpu_connector: GPUConnectorInterface | None = None,
    ) -> LMCacheEngine:
        """The engine of that name, built on the first call.

        Raises:
            ValueError: it exists and was built with other arguments; or what :class:`LMCacheManager` raises.
        """
        # The values only: a config also remembers where each came from.
        arguments = {"config": config.model_dump(), "metadata": metadata, "gpu_connector": gpu_connector}
        with cls._lock:
            built = cls._built.get(instance_id)
            if built is None:
                built = cls._built[instance_id] = _Built(LMCacheManager(config, metadata, gpu_connector), arguments)
        differing = [name for name, value in arguments.items() if built.arguments[name] != value]
        if differing:
            raise ValueError(
                f"engine {instance_id!r} exists and was built with another {' and '.join(differing)}; "
                "destroy it first, or use another instance id"
            )
        return built.manager.engine

    @classmethod
    def get(cls, instance_id: str) -> LMCacheEngine | None:
        """The engine of that name, if there is one."""
        with cls._lock:
            built = cls._built.get(instance_id)
        return None if built is None else built.manager.engine

    @classmethod
    def destroy(cls, instance_id: str) -> None:
        """Close the engine of that name and forget it; without one, nothing happens."""
        with cls._lock:
            built = cls._built.pop(instance_id, None)
        if built is not None:
            built.manager.close()
