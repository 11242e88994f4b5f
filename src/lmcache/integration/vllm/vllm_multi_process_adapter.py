"""Names that vLLM's module ``lmcache_mp_connector`` imports for its own connector, before it finds ours.

That connector, which vLLM takes where ``LMCACHE_USE_UPSTREAM_MP`` is set, speaks to another kind of server than
``lmcache server``: it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class _Refused:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "vLLM's own LMCacheMPConnector cannot speak to an `lmcache server`: unset LMCACHE_USE_UPSTREAM_MP, and "
            "vLLM takes ours"
        )


class LMCacheMPSchedulerAdapter(_Refused):
    """Not to be had here."""


class LMCacheMPWorkerAdapter(_Refused):
    """Not to be had here."""


@dataclass
class LoadStoreOp:
    """Pages to load or store, in vLLM's own connector."""

    token_ids: list[int]
    block_ids: list[int]
    start: int = 0
    end: int = 0


@dataclass
class ParallelStrategy:
    """How vLLM's own connector tells its server about ranks."""

    use_mla: bool = False
    kv_world_size: int = 1
    kv_worker_id: int = 0
    actual_world_size: int = 1
    actual_worker_id: int = 0
