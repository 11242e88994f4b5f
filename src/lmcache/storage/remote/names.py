"""What values are called in a remote store, and how everybody is made to forget them at once."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

from lmcache.keys import CacheKey, PrefixKey
from lmcache.storage.remote.interface import RemoteStore
from lmcache.storage.remote.other_sizes import OtherSizes
from lmcache.storage.remote.small_values import read_small, write_small

_ROOT = "lmcache/1"
_GENERATION = f"{_ROOT}/generation.latest"
_REFRESH_SECONDS = 30.0
_MAX_GENERATION = 32


class RemoteNames:
    """Every name holds a *generation*, which is itself a value of the store. Another generation means other names, so
    to forget everything takes one small write; others notice within half a minute, and what has the old names is left
    to the store's eviction. Thread-safe.
    """

    def __init__(
        self, tag: str = "", clock: Callable[[], float] = time.monotonic, other_sizes: OtherSizes | None = None
    ) -> None:
        """Args:
        tag: chunks with another one are others.
        other_sizes: is told with every :meth:`refresh` which sizes have left their mark.
        """
        self._tag = tag
        self._other_sizes = other_sizes
        self._marks = [] if other_sizes is None else other_sizes.marks
        self._clock = clock
        self._lock = threading.Lock()
        self.generation = "0"
        self._unpublished = False
        self._refresh_at = float("-inf")

    def of(self, key: CacheKey) -> str:
        kind = "p" if isinstance(key, PrefixKey) else "s"
        return f"{_ROOT}/{self.generation}/{key.namespace_id.hex()}/{kind}{key.digest.hex()}{self._tag}"

    def of_passage(self, kind: str, namespace: bytes, digest: bytes) -> str:
        """Of what tells where passages are, see :mod:`lmcache.segmentation`."""
        return f"{_ROOT}/{self.generation}/{namespace.hex()}/{kind}{digest.hex()}"

    def forget(self) -> None:
        """Begin a new generation, here at once and elsewhere after :meth:`refresh`."""
        with self._lock:
            self.generation, self._unpublished = secrets.token_hex(8), True
            self._refresh_at = float("-inf")

    @property
    def is_due(self) -> bool:
        return self._clock() >= self._refresh_at

    def refresh(self, store: RemoteStore, timeout: float) -> bool:
        """Bring the generation up to date, if that is due; whether it changed. To be called before the store is used.

        Raises:
            RemoteStoreError: the store failed.
        """
        if not self.is_due or not self._lock.acquire(blocking=False):
            return False
        try:
            mine = self.generation
            if self._unpublished:
                write_small(store, [(_GENERATION, mine.encode())], timeout)
                found: bytes | None = None
            else:
                found, *marks = read_small(store, [_GENERATION, *self._marks], _MAX_GENERATION, timeout)
                if self._other_sizes is not None:
                    self._other_sizes.saw(marks)
            self._unpublished = False
            self._refresh_at = self._clock() + _REFRESH_SECONDS
            if found is not None and found.isalnum():
                self.generation = found.decode()
            return self.generation != mine
        finally:
            self._lock.release()
