"""What the scheduler role tells the worker role about one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from lmcache.keys import PrefixKey


@dataclass
class LoadOp:
    """Write the KV of tokens ``[start, end)`` of a request into its pages before the forward.

    ``block_ids`` are the request's blocks from token 0. The KV itself waits in the lease that the scheduler role
    handed over under ``req_id``.
    """

    req_id: str
    token_ids: list[int]
    start: int
    end: int
    block_ids: list[int]


@dataclass
class SaveOp:
    """Keep the KV of tokens ``[start, len(token_ids))`` once this step's forward has written it."""

    req_id: str
    token_ids: list[int]
    start: int
    block_ids: list[int]
    keys: list[PrefixKey]
    lora: str
    cache_salt: str


@dataclass
class LMCacheConnectorMetadata(KVConnectorMetadata):
    """``loads`` must be done before this step's forward; ``asynchronous_loads`` run beside it. ``preempted`` names
    requests whose blocks vLLM may hand to others in this very step: their saves must be done before the forward."""

    loads: list[LoadOp] = field(default_factory=list)
    asynchronous_loads: list[LoadOp] = field(default_factory=list)
    saves: list[SaveOp] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
