"""Leases that are given back once the device has read what they hold, while the host goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol


class Releasable(Protocol):
    def release(self) -> None: ...


class DeferredReleases:
    """One thread, which waits in the host's stead."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lmcache-release")

    def after(self, done: Callable[[], object], lease: Releasable) -> None:
        """Release ``lease`` when ``done`` returns. ``done`` waits for work that is queued on the device already."""
        try:
            self._executor.submit(_release, done, lease)
        except RuntimeError:  # shut down
            _release(done, lease)

    def close(self) -> None:
        """Wait for all of them. Idempotent."""
        self._executor.shutdown(wait=True)


def _release(done: Callable[[], object], lease: Releasable) -> None:
    try:
        done()
    finally:
        lease.release()
