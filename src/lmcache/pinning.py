"""Who pinned what, so that undoing one pin never undoes another."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lmcache.keys import PrefixKey
from lmcache.storage.interface import StorageTier
from lmcache.storage.tiered import TieredStorage


class PinBook:
    """Pins runs of chunks. The last key of a run names it: it stands for all tokens before it."""

    def __init__(self, storage: TieredStorage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._runs: dict[PrefixKey, list[list[tuple[StorageTier, PrefixKey]]]] = {}

    def pin(self, keys: Sequence[PrefixKey]) -> int:
        """Pin the leading keys that are held; how many those are."""
        run: list[tuple[StorageTier, PrefixKey]] = []
        for key in keys:
            tier = self._storage.pin(key)
            if tier is None:
                break
            run.append((tier, key))
        if run:
            with self._lock:
                self._runs.setdefault(keys[-1], []).append(run)
        return len(run)

    def unpin(self, keys: Sequence[PrefixKey]) -> None:
        """Undo one :meth:`pin` of the same keys; without one, nothing happens."""
        with self._lock:
            runs = self._runs.get(keys[-1]) if keys else None
            if not runs:
                return
            run = runs.pop()
            if not runs:
                del self._runs[keys[-1]]
        _unpin(run)

    def clear(self) -> None:
        """Undo every pin."""
        with self._lock:
            runs = [run for runs in self._runs.values() for run in runs]
            self._runs.clear()
        for run in runs:
            _unpin(run)


def _unpin(run: Sequence[tuple[StorageTier, PrefixKey]]) -> None:
    for tier, key in run:
        tier.unpin(key)
