"""The tokens of the chunks that lie on disk, in a file beside them: what finds passages again after a restart."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from lmcache.keys import KEY_BYTES, CacheKey, PrefixKey, SegmentKey
from lmcache.observability.logging import init_logger, log_limited

logger = init_logger(__name__)

FILE = "passages.sqlite"
_QUEUED = 1 << 16
_BATCH = 512
_SCHEMA = "CREATE TABLE IF NOT EXISTS passages_1 (key BLOB PRIMARY KEY, row BLOB NOT NULL, digest BLOB NOT NULL)"


class CatalogRow(NamedTuple):
    """A chunk: its tokens, the position of the first in its prompt, the chunk before it, and the offsets in it at which
    passages begin."""

    key: CacheKey
    tokens: npt.NDArray[np.uint32]
    start: int
    before: CacheKey | None
    seams: tuple[int, ...]


class _Stored(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    is_prefix: bool
    tokens: bytes
    start: int
    before: bytes
    before_is_prefix: bool
    seams: tuple[int, ...]


_Change: TypeAlias = "CatalogRow | CacheKey | None"  # a row to put, a key to remove, the end


class PassageCatalog:
    """One row a chunk, written behind the caller's back by one thread.

    Every row carries a digest over all of it; one that does not match, or does not read, is dropped. A file that is no
    catalog is set aside. No method raises for a fault of the medium: from then on nothing is written.
    """

    def __init__(self, directory: Path) -> None:
        """``directory`` must be ours alone, as the disk tier's is."""
        self._path = directory / FILE
        self._queue: queue.Queue[_Change] = queue.Queue(_QUEUED)
        self._broken = False
        self.dropped = 0
        """Rows that were not written because too many were waiting."""
        self._prepare()
        self._writer = threading.Thread(target=self._write, name="lmcache-catalog", daemon=True)
        self._writer.start()

    def rows(self) -> Iterator[CatalogRow]:
        """All rows that are sound, in the order in which they were put."""
        if self._broken:
            return
        with closing(self._connect()) as connection:
            for key, row, digest in connection.execute("SELECT key, row, digest FROM passages_1 ORDER BY rowid"):
                sound = _read(key, row, digest)
                if sound is not None:
                    yield sound
                elif isinstance(key, bytes) and len(key) == KEY_BYTES:
                    log_limited(logger, logging.WARNING, "catalog:row", "a damaged row of %s was dropped", self._path)
                    self.remove(SegmentKey(key))

    def put(self, row: CatalogRow) -> None:
        """Keep ``row``. Never waits."""
        self._enqueue(row)

    def remove(self, key: CacheKey) -> None:
        """Forget ``key``. Never waits."""
        self._enqueue(key)

    def close(self) -> None:
        """Write what is queued. Idempotent."""
        if self._writer.is_alive():
            self._queue.put(None)
            self._writer.join()

    def _enqueue(self, change: _Change) -> None:
        try:
            self._queue.put_nowait(change)
        except queue.Full:
            self.dropped += 1

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=10)

    def _prepare(self) -> None:
        try:
            try:
                self._create()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                aside = self._path.with_suffix(".damaged")
                logger.warning("%s is no catalog of passages (%s): set aside as %s", self._path, error, aside.name)
                self._path.replace(aside)
                self._create()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def _create(self) -> None:
        with closing(self._connect()) as connection, connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(_SCHEMA)
            connection.execute("SELECT key FROM passages_1 LIMIT 1").fetchone()

    def _write(self) -> None:
        try:
            with closing(self._connect()) as connection:
                connection.execute("PRAGMA synchronous=NORMAL")
                while self._write_batch(connection):
                    pass
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            while self._queue.get() is not None:
                pass

    def _write_batch(self, connection: sqlite3.Connection) -> bool:
        """Wait for changes and commit them; False at the end."""
        change = self._queue.get()
        with connection:
            for written in range(_BATCH):
                if written:
                    try:
                        change = self._queue.get_nowait()
                    except queue.Empty:
                        break
                if change is None:
                    return False
                if isinstance(change, CatalogRow):
                    if not self._broken:
                        connection.execute("INSERT OR REPLACE INTO passages_1 VALUES (?, ?, ?)", _written(change))
                else:
                    connection.execute("DELETE FROM passages_1 WHERE key = ?", (bytes(change),))
        return True

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        log_limited(
            logger,
            logging.ERROR,
            "catalog:broken",
            "%s cannot be used (%s): passages will not be found again after a restart",
            self._path,
            error,
        )


def _written(row: CatalogRow) -> tuple[bytes, bytes, bytes]:
    stored = _Stored(
        is_prefix=isinstance(row.key, PrefixKey),
        tokens=row.tokens.astype("<u4").tobytes(),
        start=row.start,
        before=bytes(row.before or b""),
        before_is_prefix=isinstance(row.before, PrefixKey),
        seams=row.seams,
    )
    key, data = bytes(row.key), msgspec.msgpack.encode(stored)
    return key, data, blake3(key + data).digest()


def _read(key: object, row: object, digest: object) -> CatalogRow | None:
    """None for what is not as it was written."""
    if not (isinstance(key, bytes) and isinstance(row, bytes)) or blake3(key + row).digest() != digest:
        return None
    try:
        stored = msgspec.msgpack.decode(row, type=_Stored)
        return CatalogRow(
            _key(key, stored.is_prefix),
            np.frombuffer(stored.tokens, "<u4"),
            stored.start,
            _key(stored.before, stored.before_is_prefix) if stored.before else None,
            stored.seams,
        )
    except ValueError:  # msgspec's errors are
        return None


def _key(raw: bytes, is_prefix: bool) -> CacheKey:
    return PrefixKey(raw) if is_prefix else SegmentKey(raw)
