"""``RequestStalls``: what a request loses to us, told in its reply and counted."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lmcache.observability.metrics import Metrics


@dataclass
class _Stall:
    """Seconds. ``hooks_before`` is what the hooks had taken when the request came; ``hooks_in_wait`` lies in waits."""

    hooks_before: float
    waited: float = 0.0
    hooks_in_wait: float = 0.0
    waits_since: float | None = None
    hooks_at_wait: float = 0.0


class RequestStalls:
    """Two things hold a request up: we had the engine ask again later, or its loop stood still in a call to us, on
    whichever request's account. The second is counted from a request's first look-up to its end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._stalls: dict[str, _Stall] = {}

    def looked_up(self, req_id: str, *, answered: bool) -> None:
        """The engine asked what can be reused. Not ``answered``: it must ask again, and the request waits."""
        hooks = self._metrics.hooks.seconds
        stall = self._stalls.get(req_id)
        if stall is None:
            stall = self._stalls[req_id] = _Stall(hooks)
        if answered:
            self._end_wait(stall)
        elif stall.waits_since is None:
            stall.waits_since, stall.hooks_at_wait = time.monotonic(), hooks

    def ended(self, req_id: str) -> dict[str, float]:
        """Milliseconds of ``wait`` for the cache, and in ``hooks`` besides."""
        stall = self._stalls.pop(req_id, None)
        if stall is None:
            return {"wait": 0.0, "hooks": 0.0}
        self._end_wait(stall)
        in_hooks = max(0.0, self._metrics.hooks.seconds - stall.hooks_before - stall.hooks_in_wait)
        return {"wait": round(1e3 * stall.waited, 3), "hooks": round(1e3 * in_hooks, 3)}

    def _end_wait(self, stall: _Stall) -> None:
        if stall.waits_since is None:
            return
        waited, stall.waits_since = time.monotonic() - stall.waits_since, None
        stall.waited += waited
        stall.hooks_in_wait += self._metrics.hooks.seconds - stall.hooks_at_wait
        self._metrics.waited(waited)
