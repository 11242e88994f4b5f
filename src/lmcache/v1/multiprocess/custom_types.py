"""A name that vLLM's module ``lmcache_mp_connector`` imports, and uses for its own connector alone."""

from __future__ import annotations

from typing import NamedTuple


class RequestAllocationRecord(NamedTuple):
    """The pages of a request, as vLLM's own connector tells them to its own kind of server."""

    req_id: str
    new_block_ids: list[int]
    new_token_ids: list[int]
