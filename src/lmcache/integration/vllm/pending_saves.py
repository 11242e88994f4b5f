"""Saves run beside the next forward; the blocks they read stay allocated until they are done."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from lmcache.keys import PrefixKey


class PendingSaves:
    """The queue of page reads that both roles of a connector look at.

    One thread, so saves keep their order. A request that finishes while one of its saves is under way keeps its
    blocks (:meth:`delay_free`) until :meth:`take_freed` names it.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lmcache-save")
        self._changed = threading.Condition()
        self._by_request: Counter[str] = Counter()
        self._keys: Counter[PrefixKey] = Counter()
        self._delayed: set[str] = set()
        self._freed: set[str] = set()

    def submit(self, req_id: str, keys: Iterable[PrefixKey], save: Callable[[], object]) -> None:
        """Run ``save`` in the background. It must not raise."""
        keys = tuple(keys)
        with self._changed:
            self._by_request[req_id] += 1
            self._keys.update(keys)
        try:
            future = self._executor.submit(save)
        except RuntimeError:  # shut down: the save is dropped
            self._done(req_id, keys)
            return
        future.add_done_callback(partial(self._on_done, req_id, keys))

    def _on_done(self, req_id: str, keys: tuple[PrefixKey, ...], _: Future[object]) -> None:
        self._done(req_id, keys)

    def _done(self, req_id: str, keys: tuple[PrefixKey, ...]) -> None:
        with self._changed:
            self._by_request[req_id] -= 1
            if not self._by_request[req_id]:
                del self._by_request[req_id]
                if req_id in self._delayed:
                    self._delayed.remove(req_id)
                    self._freed.add(req_id)
            for key in keys:
                self._keys[key] -= 1
                if not self._keys[key]:
                    del self._keys[key]
            self._changed.notify_all()

    def will_hold(self, key: PrefixKey) -> bool:
        """Whether a save under way will make ``key`` available in a moment."""
        with self._changed:
            return key in self._keys

    def delay_free(self, req_id: str) -> bool:
        """Whether a finished request must keep its blocks; if so :meth:`take_freed` will name it once."""
        with self._changed:
            if req_id not in self._by_request:
                return False
            self._delayed.add(req_id)
            return True

    def free_when_done(self, req_id: str) -> None:
        """:meth:`take_freed` is to name a request of which no more saves will come, be it at once."""
        with self._changed:
            (self._delayed if req_id in self._by_request else self._freed).add(req_id)

    def take_freed(self) -> set[str]:
        """Requests of :meth:`delay_free` and :meth:`free_when_done` whose saves have ended since the last call."""
        with self._changed:
            freed, self._freed = self._freed, set()
            return freed

    def wait(self, req_ids: Iterable[str] | None = None) -> None:
        """Block until the saves of ``req_ids`` (of everyone when None) are done."""
        names = None if req_ids is None else list(req_ids)
        with self._changed:
            self._changed.wait_for(
                lambda: not self._by_request if names is None else not any(n in self._by_request for n in names)
            )

    def close(self) -> None:
        """Finish what is queued and stop. Idempotent."""
        self._executor.shutdown(wait=True)
