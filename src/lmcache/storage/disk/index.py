"""What the directory holds, in SQLite: the part of the tier that outlives the process.

A row is written ``ready = 0`` before its file exists and set to 1 when the file is complete, so after a crash every
file that may be unfinished is known by its number. Rows are numbered in the order of writing: inserting appends to
the table, and eviction mostly frees whole pages at its other end.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.disk.packed import Packed, decode_stored, encode_stored
from lmcache.storage.spec_codec import decode_key, key_kind

INDEX_FILE = "index.db"
ROWS_PER_COMMIT = 64
"""At most so many rows of a kind in one transaction, which bounds what it adds to the write-ahead log."""

_SCHEMA_VERSION = 1
_PAGE = 4096
_CHECKPOINT_PAGES = 128
# A commit changes at most 4 kinds of 64 rows. New and finished rows lie side by side in the table; for the other
# two assume a page for each row and two neighbours that balancing touches.
_COMMIT_PAGES = 2 * 3 * ROWS_PER_COMMIT + 16
WAL_BYTES = (_CHECKPOINT_PAGES + _COMMIT_PAGES) * (_PAGE + 24) + 32
"""The write-ahead log never grows beyond this."""

_SETTINGS = f"""
PRAGMA page_size = {_PAGE};
PRAGMA locking_mode = EXCLUSIVE; -- no shared-memory file; the directory lock keeps others away
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES};
PRAGMA journal_size_limit = {WAL_BYTES};
PRAGMA temp_store = MEMORY; -- nothing on disk that is not accounted for
"""
_CREATE_TABLE = """
CREATE TABLE chunk (
    file_id INTEGER PRIMARY KEY,
    kind INTEGER NOT NULL,
    key BLOB NOT NULL,
    spec BLOB NOT NULL,
    ready INTEGER NOT NULL,
    last_use INTEGER NOT NULL
)
"""

Specs: TypeAlias = "dict[bytes, tuple[KVSpec, Packed | None]]"

_READY_ROWS = "SELECT file_id, kind, key, spec, last_use FROM chunk WHERE ready = 1 ORDER BY last_use"


class IndexRow(NamedTuple):
    """A chunk. ``packed`` is None where its payload is the chunk's bytes."""

    file_id: int
    key: CacheKey
    spec: KVSpec
    last_use: int
    packed: Packed | None = None

    @property
    def key_id(self) -> str:
        """Of the key that the chunk is encrypted with; empty if it is not."""
        return "" if self.packed is None else self.packed.key_id


class IndexDamagedError(Exception):
    """The index file is not a database of ours; only starting empty helps."""


def read_index(directory: Path) -> Iterator[IndexRow]:
    """The complete chunks of a directory that nobody writes. Changes nothing there.

    What a crashed process had left in its write-ahead log is not seen: files that it had removed are still listed.

    Raises:
        IndexDamagedError: the file is not a sound index of this version.
        sqlite3.OperationalError: there is none, or the medium failed.
    """
    name = f"{(directory / INDEX_FILE).absolute().as_uri()}?mode=ro&immutable=1"
    with closing(sqlite3.connect(name, uri=True)) as db:
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version != _SCHEMA_VERSION:
                raise IndexDamagedError(f"index of version {version}, this program reads {_SCHEMA_VERSION}")
            specs: Specs = {}
            for raw in db.execute(_READY_ROWS):
                row = _parse_row(raw, specs)
                if isinstance(row, IndexRow):
                    yield row
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise IndexDamagedError(str(error)) from error


class DiskIndex:
    """One connection, used by one thread at a time. Every method but the constructor raises ``sqlite3.Error`` when
    the medium fails; a failed transaction leaves nothing behind.

    Attributes:
        next_file_id: greater than that of every row when the index was opened.
        last_use: the latest of all rows when the index was opened.
    """

    def __init__(self, directory: Path) -> None:
        """Raises:
        IndexDamagedError: the file is there but is not a sound index of this version.
        sqlite3.OperationalError: the medium failed.
        """
        self._wal = directory / f"{INDEX_FILE}-wal"
        self._db = sqlite3.connect(directory / INDEX_FILE, check_same_thread=False, isolation_level=None)
        try:
            self._db.executescript(_SETTINGS)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                with self._transaction():
                    self._db.execute(_CREATE_TABLE)
                    self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise IndexDamagedError(f"index of version {version}, this program reads {_SCHEMA_VERSION}")
            self.next_file_id, self.last_use = self._newest()
        except sqlite3.OperationalError as error:
            self._db.close()
            if "no such" in str(error) or "already exists" in str(error):
                raise IndexDamagedError(str(error)) from error
            raise
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise IndexDamagedError(str(error)) from error
        except BaseException:
            self._db.close()
            raise
        _open.add(self)

    def _newest(self) -> tuple[int, int]:
        # In a damaged row it may be anything; such rows are dropped when they are read.
        newest_use = "max(CASE typeof(last_use) WHEN 'integer' THEN last_use END)"
        query = f"SELECT ifnull(max(file_id), 0) + 1, ifnull({newest_use}, 0) FROM chunk"
        next_file_id, last_use = self._db.execute(query).fetchone()
        return int(next_file_id), int(last_use)

    def ready_rows(self) -> Iterator[IndexRow | int]:
        """Every complete chunk, least recently used first. A row that makes no sense comes as its bare number.

        Raises:
            IndexDamagedError: the table cannot be read to its end.
        """
        specs: Specs = {}
        try:
            for raw in self._db.execute(_READY_ROWS):
                yield _parse_row(raw, specs)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise IndexDamagedError(str(error)) from error

    def pending_ids(self) -> list[int]:
        """Numbers of the files whose writing was begun and not finished."""
        return [file_id for (file_id,) in self._db.execute("SELECT file_id FROM chunk WHERE ready = 0")]

    def commit(
        self,
        *,
        begun: Collection[IndexRow] = (),
        finished: Collection[int] = (),
        packed: Collection[IndexRow] = (),
        gone: Collection[int] = (),
        used: Mapping[int, int] | None = None,
    ) -> None:
        """All of this or nothing.

        Args:
            begun: files about to be written.
            finished: files that are complete.
            packed: those of them that take another number of bytes, or are packed otherwise, than they were begun
                with. Begin them with the most that they may take: rows that grow would need new pages.
            gone: files that are no more; unknown numbers are ignored.
            used: file number → time of its last use, a number that grows from use to use.
        """
        with self._transaction():
            run = self._db.executemany
            if begun:
                run(
                    "INSERT INTO chunk VALUES (?, ?, ?, ?, 0, ?)",
                    [
                        (r.file_id, key_kind(r.key), bytes(r.key), encode_stored(r.spec, r.packed), r.last_use)
                        for r in begun
                    ],
                )
            if packed:
                run(
                    "UPDATE chunk SET spec = ? WHERE file_id = ?",
                    [(encode_stored(r.spec, r.packed), r.file_id) for r in packed],
                )
            if finished:
                run("UPDATE chunk SET ready = 1 WHERE file_id = ?", [(i,) for i in finished])
            if gone:
                run("DELETE FROM chunk WHERE file_id = ?", [(i,) for i in gone])
            if used:
                run("UPDATE chunk SET last_use = ? WHERE file_id = ?", [(t, i) for i, t in used.items()])

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database and empty it."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._bound_wal()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # SQLite may have rolled back by itself (disk full, I/O error).
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _bound_wal(self) -> None:
        # A checkpoint that fails is retried by SQLite at the next commit, which grows the log meanwhile.
        if self._wal.exists() and self._wal.stat().st_size > WAL_BYTES - _COMMIT_PAGES * (_PAGE + 24):
            self.checkpoint()


def _parse_row(raw: tuple[int, int, bytes, bytes, object], specs: Specs) -> IndexRow | int:
    """The row, or its number alone when it makes no sense. ``specs`` keeps what was decoded: few differ."""
    file_id, kind, key, encoded, last_use = raw
    try:
        if not isinstance(last_use, int):
            return file_id
        stored = specs.get(encoded)
        if stored is None:
            stored = specs[encoded] = decode_stored(encoded)
        return IndexRow(file_id, decode_key(kind, key), stored[0], last_use, stored[1])
    except (ValueError, TypeError):
        return file_id


_open: weakref.WeakSet[DiskIndex] = weakref.WeakSet()


def _leak_in_child() -> None:
    # A forked child must never close its copy of a connection, not even when its interpreter ends: SQLite would take
    # it for the last one and remove the write-ahead log under the parent. So no count of it ever reaches zero.
    for index in list(_open):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(index._db))


os.register_at_fork(after_in_child=_leak_in_child)
