"""What the scheduler role tells the worker role about one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from lmcache.keys import PrefixKey, Tokens
from lmcache.prompt import Chunk


@dataclass
class LoadOp:
    """Write the KV of tokens ``[start, end)`` of a request into its pages before the forward.

    ``block_ids`` are the request's blocks from token 0. The KV itself waits in the lease that the scheduler role
    handed over under the name ``lease``. ``tokens_say_all``: the KV hangs on nothing but the tokens; of a prompt with
    pictures it hangs on those too.
    """

    req_id: str
    token_ids: Tokens
    start: int
    end: int
    block_ids: list[int]
    lease: str = ""
    tokens_say_all: bool = True


@dataclass
class SaveOp:
    """Keep the KV of tokens ``[start, len(token_ids))`` once this step's forward has written it.

    ``seams`` are positions at which a passage is known to begin.
    """

    req_id: str
    token_ids: Tokens
    start: int
    block_ids: list[int]
    keys: list[PrefixKey]
    lora: str
    cache_salt: str
    seams: list[int] = field(default_factory=list)


@dataclass
class BlendOp:
    """Fill a request's pages by CacheBlend before the forward. What is reused waits under ``req_id``.

    ``block_ids`` are the request's blocks from token 0; of their tokens the first ``exact_tokens`` are there already,
    or are loaded in this step.
    """

    req_id: str
    exact_tokens: int
    block_ids: list[int]
    planned: PlannedBlend | None = None


@dataclass
class PlannedBlend:
    """What a worker role needs to know of a blend that was planned in another process.

    ``passages`` are ``(match, start, end)`` of the lease of that name, ``params`` the request's
    ``kv_transfer_params`` as far as they are ours.
    """

    lease: str
    token_ids: Tokens
    passages: list[tuple[int, int, int]]
    params: dict[str, Any]


@dataclass
class SegmentSaveOp:
    """Keep the chunks of ``runs``, each by itself, once this step's forward has written them.

    ``token_ids`` are those of the whole prompt. ``before`` is the chunk in front of the first of a run, if it is kept.
    """

    req_id: str
    token_ids: Tokens
    block_ids: list[int]
    runs: list[SegmentRun]
    seams: list[int]
    lora: str = ""
    cache_salt: str = ""


class SegmentRun(NamedTuple):
    """Consecutive chunks of a prompt, and the key of the chunk before them if that is kept too."""

    chunks: list[Chunk]
    before: PrefixKey | None


@dataclass
class LMCacheConnectorMetadata(KVConnectorMetadata):
    """``loads``, then ``blends`` must be done before this step's forward; ``asynchronous_loads`` run beside it.
    ``preempted`` names requests whose blocks vLLM may hand to others in this very step: their saves must be done before
    the forward. ``delayed_frees`` names requests that have finished and whose blocks stay until the worker role names
    them, because their saves are done."""

    loads: list[LoadOp] = field(default_factory=list)
    asynchronous_loads: list[LoadOp] = field(default_factory=list)
    blends: list[BlendOp] = field(default_factory=list)
    saves: list[SaveOp] = field(default_factory=list)
    segment_saves: list[SegmentSaveOp] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    delayed_frees: list[str] = field(default_factory=list)

    @property
    def fills_pages(self) -> bool:
        """Whether there is something to do before this step's forward."""
        return bool(self.loads or self.blends)
