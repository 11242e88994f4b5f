"""Which requests' loads went wrong, in whichever rank."""

from __future__ import annotations

from typing import Any

import msgspec

from lmcache.integration.vllm.parallel.messages import Outcome, WhatBecameOf
from lmcache.integration.vllm.parallel.ranks import Ranks


class FailedLoads:
    """As much of a ``set`` of request ids as the scheduler role needs. Asks the ranks about requests that load."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._loading: set[str] = set()
        self._failed: set[str] = set()

    def watch(self, req_id: str) -> None:
        """The ranks have been told to load for ``req_id``, or to blend."""
        self._loading.add(req_id)

    def __contains__(self, req_id: str) -> bool:
        if req_id in self._loading and req_id not in self._failed:
            self._ask(req_id, forget=False)
        return req_id in self._failed

    def discard(self, req_id: str) -> None:
        self._failed.discard(req_id)

    def settle(self, req_id: str) -> dict[str, Any] | None:
        """``req_id`` has ended; gives the report of its blend. What the ranks remember of it is forgotten."""
        if req_id not in self._loading:
            return None
        outcomes = self._ask(req_id, forget=True)
        self._loading.discard(req_id)
        report = outcomes[0].report if outcomes else b""
        return msgspec.json.decode(report) if report else None

    def _ask(self, req_id: str, *, forget: bool) -> list[Outcome]:
        outcomes = self._ranks.ask(WhatBecameOf(req_id, forget), Outcome) or []
        if any(outcome.failed for outcome in outcomes):
            self._failed.add(req_id)
        return outcomes
