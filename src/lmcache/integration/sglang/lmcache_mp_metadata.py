"""What SGLang 0.5.21 and later keeps of a request beside its radix tree; the fields are SGLang's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmcache.integration.sglang.generation_c.operations import Load, Lookup, Store


@dataclass
class LMCacheExternalFlow:
    """A request whose prompt is looked up, then loaded. ``key`` is SGLang's radix key of the prompt."""

    key: Any
    lookup: Lookup
    total_hit: int | None = None
    local_hit_tokens: int | None = None
    load: Load | None = None
    load_completed: bool = False
    cancelled: bool = False
    retire_requested: bool = False
    prefix_published: bool = False
    loaded_skip_tokens: int = 0
    released_skip_tokens: int = 0
    mamba_value: Any = None
    request_mamba_value: Any = None
    allocated_request_mamba_for_load: bool = False
    load_req: Any = None
    free_mamba_after_load: bool = False
    anchor_node: Any = None
    anchor_lock: Any = None

    def __post_init__(self) -> None:
        self.lookup.flow = self


@dataclass
class LMCachePendingStore:
    """A store under way, and the node of the tree that is locked for it."""

    operation: Store
    node_id: Any
    lock_params: Any
