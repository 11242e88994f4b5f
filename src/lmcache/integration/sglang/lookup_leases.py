"""What was found for requests that are still queued, held until they are scheduled."""

from __future__ import annotations

import time
from collections.abc import Callable

from lmcache.lease import PrefixLease


class LookupLeases:
    """Leases by request, each held for ``max_seconds`` at most: SGLang never speaks again of a request that is aborted
    while it is queued.

    Leases that are too old are given back at the next call, of whatever kind: until then nothing of ours wants their
    memory. For one thread.
    """

    def __init__(self, max_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_seconds = max_seconds
        self._clock = clock
        self._held: dict[str, tuple[float, PrefixLease]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, request_id: str, lease: PrefixLease) -> None:
        """Take over ``lease``, in place of an earlier one of this request."""
        self.release(request_id)
        self._held[request_id] = (self._clock() + self._max_seconds, lease)

    def take(self, request_id: str) -> PrefixLease | None:
        """Hand over the lease of this request; None when there is none any more."""
        self.release_old()
        _, lease = self._held.pop(request_id, (0.0, None))
        return lease

    def release(self, request_id: str) -> None:
        """Idempotent."""
        lease = self.take(request_id)
        if lease is not None:
            lease.release()

    def release_old(self) -> None:
        # Oldest first: a lease that is renewed goes to the end.
        now = self._clock()
        while self._held:
            request_id, (deadline, lease) = next(iter(self._held.items()))
            if deadline > now:
                return
            del self._held[request_id]
            lease.release()

    def release_all(self) -> None:
        while self._held:
            _, (_, lease) = self._held.popitem()
            lease.release()
