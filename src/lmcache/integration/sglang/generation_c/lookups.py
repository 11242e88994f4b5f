"""The look-ups of requests that are queued, and what is held for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from lmcache.cache_engine import LMCacheEngine
from lmcache.integration.guard import report_failure
from lmcache.integration.sglang.generation_c.operations import Lookup
from lmcache.integration.sglang.tenants import tenant_of

_HOLD_SECONDS = 600.0  # at most for a request that is queued; one that is loaded later looks again


class Lookups:
    """By request. Nothing raises: what fails is a look-up that found nothing. For one thread."""

    def __init__(
        self,
        engine: LMCacheEngine,
        hold_seconds: float = _HOLD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._hold_seconds = hold_seconds
        self._clock = clock
        self._open: dict[str, Lookup] = {}

    @property
    def request_ids(self) -> set[str]:
        return set(self._open)

    def start(self, request_id: str, token_ids: Sequence[int], cache_salt: str) -> Lookup:
        """Hold what there is of a prompt and start to read what lies on disk, in place of an earlier look-up."""
        self.end(request_id)
        self._release_old()
        now = self._clock()
        salt, exact = tenant_of(cache_salt)
        lookup = self._open[request_id] = Lookup(
            request_id,
            np.asarray(token_ids, dtype=np.int64),
            salt,
            deadline=now + self._engine.config.max_disk_wait_seconds,
            hold_until=now + self._hold_seconds,
            exact=exact,
        )
        try:
            lookup.lease = self._engine.prefetch(lookup.token_ids, cache_salt=salt, paged=True, ask_stores=True)
        except Exception as error:
            self._failed(error)
        return lookup

    def get(self, request_id: str) -> Lookup | None:
        return self._open.get(request_id)

    def is_ready(self, lookup: Lookup) -> bool:
        """Whether this rank waits no longer for what it reads."""
        try:
            return lookup.lease is None or self._clock() > lookup.deadline or lookup.lease.ready()
        except Exception as error:
            self._failed(error)
            return True

    def cut(self, lookup: Lookup) -> int:
        """How many tokens this rank has. It is content with them: another may have waited longer."""
        try:
            if lookup.lease is None:
                return 0
            lookup.lease.cut()
            return lookup.lease.num_tokens
        except Exception as error:
            self._failed(error)
            return 0

    def give_back(self, lookup: Lookup) -> None:
        """Idempotent."""
        try:
            lookup.release()
        except Exception as error:
            self._failed(error)

    def end(self, request_id: str) -> None:
        """Idempotent."""
        lookup = self._open.pop(request_id, None)
        if lookup is not None:
            self.give_back(lookup)

    def _release_old(self) -> None:
        # Oldest first: one that starts again goes to the end.
        now = self._clock()
        for lookup in self._open.values():
            if lookup.hold_until > now:
                return
            self.give_back(lookup)

    def _failed(self, error: Exception) -> None:
        report_failure(self._engine.metrics, "lookup", error)
