"""The tokens of the chunks that lie on disk, in a file beside them: what finds passages again after a restart."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from lmcache.keys import CacheKey
from lmcache.observability.logging import init_logger, log_limited
from lmcache.segmentation.passage_row import PassageRow, decode_row, encode_row
from lmcache.storage.chunk_format import ChunkFormat

logger = init_logger(__name__)

FILE = "passages.sqlite"
_QUEUED = 1 << 16
_BATCH = 512
# As SQLite keeps it: whatever else a file says of itself, it is of another program.
_SCHEMA = "CREATE TABLE passages_1 (key BLOB PRIMARY KEY, row BLOB NOT NULL, digest BLOB NOT NULL)"
_SEALED_SCHEMA = "CREATE TABLE passages_1 (key BLOB PRIMARY KEY, row BLOB NOT NULL, digest BLOB NOT NULL, sealed)"


_TABLES = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"

# A row to put, a key to remove, the rowid of a damaged row, damage that was met when reading, the end.
_Change: TypeAlias = "PassageRow | CacheKey | int | sqlite3.DatabaseError | None"


class PassageCatalog:
    """One row a chunk, written behind the caller's back by one thread.

    Every row carries a digest over all of it; one that does not match, or does not read, is dropped. A file that is no
    catalog, or turns out to be damaged, is set aside. No method raises for a fault of the medium: from then on nothing
    is written.

    Where chunks are encrypted, so are the tokens and the digest over them; a file that holds them in the clear is
    removed, and so is what was set aside of one.
    """

    def __init__(self, directory: Path, chunk_format: ChunkFormat | None = None) -> None:
        """``directory`` must be ours alone, as the disk tier's is; ``chunk_format`` is its, and says what encrypts."""
        self._path = directory / FILE
        self._format = chunk_format or ChunkFormat()
        self._schema = _SEALED_SCHEMA if self._format.key_id else _SCHEMA
        self._queue: queue.Queue[_Change] = queue.Queue(_QUEUED)
        self._broken = self._reading = self._set_aside_once = False
        self.dropped = 0
        """Rows that were not written because too many were waiting."""
        self._prepare()
        self._writer = threading.Thread(target=self._write, name="lmcache-catalog", daemon=True)
        self._writer.start()

    def rows(self) -> Iterator[PassageRow]:
        """All rows that are sound, in the order in which they were put."""
        if self._broken:
            return
        self._reading, failure = True, None
        try:
            with closing(self._connect()) as connection:
                rows = connection.execute("SELECT rowid, key, row, digest FROM passages_1 ORDER BY rowid")
                for rowid, key, row, digest in rows:
                    sound = self._decoded(key, row, digest)
                    if sound is not None:
                        yield sound
                        continue
                    log_limited(logger, logging.WARNING, "catalog:row", "a damaged row of %s was dropped", self._path)
                    self._enqueue(rowid)
        except sqlite3.DatabaseError as error:
            failure = error
        finally:
            self._reading = False
        if failure is not None and _is_damage(failure):
            self._enqueue(failure)
        elif failure is not None:
            self._give_up(failure)

    def put(self, row: PassageRow) -> None:
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
        connection = sqlite3.connect(self._path, timeout=10)
        connection.text_factory = bytes  # damage can make text of anything
        return connection

    def _prepare(self) -> None:
        try:
            if self._format.key_id:
                self._remove_clear()
            try:
                self._create()
            except sqlite3.DatabaseError as error:
                self._start_afresh(error)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def _remove_clear(self) -> None:
        """Overwriting rows would leave those that were removed earlier, so the whole file goes."""
        self._path.with_suffix(".damaged").unlink(missing_ok=True)
        if not self._path.exists():
            return
        try:
            with closing(self._connect()) as connection:
                is_sealed = connection.execute(_TABLES).fetchall() == [(_SEALED_SCHEMA.encode(),)]
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            is_sealed = False
        if not is_sealed:
            logger.warning("%s holds passages that are not encrypted; it is removed", self._path)
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(FILE + suffix).unlink(missing_ok=True)

    def _create(self) -> None:
        with closing(self._connect()) as connection, connection:
            tables = connection.execute(_TABLES).fetchall()
            if not tables:
                connection.execute(self._schema)
            elif tables != [(self._schema.encode(),)]:
                raise sqlite3.DatabaseError("it is of another program")
        with closing(self._connect()) as connection:
            connection.execute("PRAGMA journal_mode=WAL")

    def _start_afresh(self, error: sqlite3.DatabaseError) -> None:
        """Set the file aside and begin another, if that can help; raises ``error`` if not."""
        # A reader would take its log with it.
        if not _is_damage(error) or self._set_aside_once or self._reading:
            raise error
        self._set_aside_once = True
        aside = self._path.with_suffix(".damaged")
        logger.warning("%s is no sound catalog of passages (%s): set aside as %s", self._path, error, aside.name)
        self._path.replace(aside)
        for suffix in ("-wal", "-shm"):  # SQLite would play the log into the new file
            self._path.with_name(FILE + suffix).unlink(missing_ok=True)
        self._create()

    def _write(self) -> None:
        try:
            try:
                self._write_all()
            except sqlite3.DatabaseError as error:
                self._start_afresh(error)
                self._write_all()
        except Exception as error:
            self._give_up(error)
            while self._queue.get() is not None:
                pass

    def _write_all(self) -> None:
        with closing(self._connect()) as connection:
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA secure_delete=ON")
            while self._write_batch(connection):
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
                if isinstance(change, sqlite3.DatabaseError):
                    raise change
                if isinstance(change, PassageRow):
                    self._insert(connection, change)
                elif isinstance(change, int):
                    connection.execute("DELETE FROM passages_1 WHERE rowid = ?", (change,))
                else:
                    connection.execute("DELETE FROM passages_1 WHERE key = ?", (bytes(change),))
        return True

    def _insert(self, connection: sqlite3.Connection, row: PassageRow) -> None:
        key, data, digest = encode_row(row)
        if self._format.key_id:
            name = key.hex()
            values = (key, self._format.seal(data, f"row/{name}"), self._format.seal(digest, f"digest/{name}"))
            connection.execute("INSERT OR REPLACE INTO passages_1 VALUES (?, ?, ?, 1)", values)
        else:
            connection.execute("INSERT OR REPLACE INTO passages_1 VALUES (?, ?, ?)", (key, data, digest))

    def _decoded(self, key: object, row: object, digest: object) -> PassageRow | None:
        if self._format.key_id:
            if not (isinstance(key, bytes) and isinstance(row, bytes) and isinstance(digest, bytes)):
                return None
            name = key.hex()
            row, digest = self._format.unseal(row, f"row/{name}"), self._format.unseal(digest, f"digest/{name}")
        return decode_row(key, row, digest)

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


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is to blame. Its subclasses say that the medium or the program is."""
    return type(error) is sqlite3.DatabaseError
