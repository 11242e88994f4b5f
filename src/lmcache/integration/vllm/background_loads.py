"""Loads that run beside the forward of other requests (the dynamic connector)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class BackgroundLoads:
    """One thread; every request that was submitted is named once by :meth:`take_finished`, failed or not."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lmcache-load")
        self._lock = threading.Lock()
        self._finished: set[str] = set()

    def submit(self, req_id: str, load: Callable[[], object]) -> None:
        """Run ``load`` in the background. It must not raise."""
        future = self._executor.submit(load)
        future.add_done_callback(lambda _: self._on_done(req_id))

    def _on_done(self, req_id: str) -> None:
        with self._lock:
            self._finished.add(req_id)

    def take_finished(self) -> set[str]:
        with self._lock:
            finished, self._finished = self._finished, set()
            return finished

    def close(self) -> None:
        self._executor.shutdown(wait=True)
