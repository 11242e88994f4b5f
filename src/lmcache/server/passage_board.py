"""``PassageBoard``: the passages that engines have told the server of, told to all others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from lmcache.keys import CacheKey
from lmcache.observability.logging import init_logger
from lmcache.segmentation.passage_catalog import PassageCatalog
from lmcache.segmentation.passage_row import PassageRow, decode_row, encode_row
from lmcache.server.protocol import Passages, Rows, encode

logger = init_logger(__name__)

_BATCH = 256
_MIN_SWEEP = 4096


class PassageBoard:
    """Kept as it was written; with a catalog it outlives the server. Thread-safe."""

    def __init__(self, holds: Callable[[Sequence[CacheKey]], list[bool]], catalog: PassageCatalog | None) -> None:
        """``holds``: which chunks the server has."""
        self._holds = holds
        self._catalog = catalog
        self._lock = threading.Lock()
        self._rows: dict[CacheKey, tuple[bytes, bytes, bytes]] = {}
        self._swept = 0
        self._listeners: dict[object, Callable[[bytes], None]] = {}
        if catalog is not None:
            self._rows = {row.key: encode_row(row) for row in catalog.rows()}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Rows, sender: object) -> None:
        """Note what is new and sound of ``rows``, and tell everybody but ``sender``."""
        sound = [row for each in rows if (row := decode_row(*each)) is not None]
        with self._lock:
            new = [row for row in sound if row.key not in self._rows]
            fresh = [self._note(row) for row in new]
            tell = [send for who, send in self._listeners.items() if who is not sender] if fresh else []
        if tell:
            message = encode(Passages(fresh, False))
            for send in tell:
                send(message)
        if len(self._rows) > max(_MIN_SWEEP, 2 * self._swept):
            self._sweep()

    def subscribe(self, who: object, send: Callable[[bytes], None]) -> None:
        """Send ``who`` all that is known, and what others add from now on. ``send`` must not wait."""
        self._sweep()
        with self._lock:
            self._listeners[who] = send
            rows = list(self._rows.values())
        for start in range(0, len(rows), _BATCH):
            send(encode(Passages(rows[start : start + _BATCH], False)))
        send(encode(Passages([], True)))

    def unsubscribe(self, who: object) -> None:
        with self._lock:
            self._listeners.pop(who, None)

    def close(self) -> None:
        """Write what is queued."""
        if self._catalog is not None:
            self._catalog.close()

    def _note(self, row: PassageRow) -> tuple[bytes, bytes, bytes]:
        if self._catalog is not None:
            self._catalog.put(row)
        encoded = self._rows[row.key] = encode_row(row)
        return encoded

    def _sweep(self) -> None:
        with self._lock:
            keys = list(self._rows)
        gone = [key for key, held in zip(keys, self._holds(keys), strict=True) if not held]
        with self._lock:
            for key in gone:
                self._rows.pop(key, None)
                if self._catalog is not None:
                    self._catalog.remove(key)
            self._swept = len(self._rows)
