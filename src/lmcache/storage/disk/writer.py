"""The one thread that changes the directory and its index: it removes files, then writes new ones in bursts."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from lmcache.observability.logging import init_logger, log_limited
from lmcache.storage.breaker import CircuitBreaker
from lmcache.storage.disk.catalog import Catalog
from lmcache.storage.disk.chunk_directory import ChunkDirectory
from lmcache.storage.disk.index import ROWS_PER_COMMIT, DiskIndex
from lmcache.storage.disk.work import Condemned
from lmcache.storage.disk.write_queue import Write

logger = init_logger(__name__)

_PERSIST_SECONDS = 5.0
"""How often the order of last use reaches the index when nothing is written."""

_BURSTS_UNDER_WAY = 2

Burst: TypeAlias = "list[tuple[Write, Future[bool] | None]]"
"""Chunks and whether they could be written; None: not even tried."""


class DiskWriter:
    """Carries out what the catalog decides, in the order that keeps the directory within its capacity.

    A burst is written in two phases: its rows as unfinished in one commit, its files, its rows as finished in another.
    While the files of one are being written the next is prepared.
    """

    def __init__(
        self, catalog: Catalog, chunks: ChunkDirectory, index: DiskIndex, *, write_threads: int, fsync: bool
    ) -> None:
        self.breaker = CircuitBreaker()
        self._catalog = catalog
        self._chunks = chunks
        self._index = index
        self._fsync = fsync
        self._gone: list[int] = []  # removed files whose rows are still there
        self._pool = ThreadPoolExecutor(write_threads, thread_name_prefix="lmcache-disk-write")
        self._thread = threading.Thread(target=self._run, name="lmcache-disk-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """After :meth:`Catalog.stop`: wait for the file that is being written and persist the order of last use."""
        self._thread.join()
        self._pool.shutdown()
        self._persist()

    def sweep(self) -> None:
        """Remove files that no row knows: what a power loss can leave behind."""
        try:
            removed = self._chunks.sweep(self._catalog.file_ids(), lambda: self._catalog.stopped)
        except OSError as error:
            self._fail(f"sweep_{errno_name(error)}", "looking for orphaned files", error)
        else:
            if removed:
                logger.warning("disk tier: removed %d files that the index does not know", removed)

    def unlink(self, condemned: Sequence[Condemned]) -> None:
        self._gone += [doomed.file_id for doomed in condemned if self._unlink_file(doomed)]
        self._commit()

    def unlink_condemned(self) -> None:
        """Before :meth:`start`: remove what did not fit."""
        while (work := self._catalog.take_work(timeout=0)) is not None and work.condemned:
            self.unlink(work.condemned)

    def _run(self) -> None:
        # Before the first write: orphans take space that is not accounted for.
        self.sweep()
        bursts: deque[Burst] = deque()
        while True:
            # While files are being written, remove and prepare what comes next, so that the disk never waits for us.
            work = self._catalog.take_work(0 if bursts else _PERSIST_SECONDS, busy=bool(bursts))
            if work is not None and work.condemned:
                self.unlink(work.condemned)
                continue
            if work is not None and work.writes:
                bursts.append(self._begin(work.writes))
                if len(bursts) < _BURSTS_UNDER_WAY:
                    continue
            if bursts:
                self._end(bursts.popleft())
            else:
                self._persist()
                if work is None:
                    return

    def _begin(self, writes: list[Write]) -> Burst:
        tried = self.breaker.allows() and self._commit(begun=writes)
        return [(write, self._submit(write) if tried else None) for write in writes]

    def _submit(self, write: Write) -> Future[bool]:
        try:
            return self._pool.submit(self._write_file, write)
        except RuntimeError:
            # An interpreter that ends refuses work to its pools before it calls what was registered to close us.
            done: Future[bool] = Future()
            done.set_result(self._write_file(write))
            return done

    def _end(self, burst: Burst) -> None:
        done = [write for write, outcome in burst if outcome is not None and outcome.result()]
        if not (done and self._commit(finished=done)):
            done = []
        self._catalog.end_writes(done, [write for write, _ in burst if write not in done])

    def _write_file(self, write: Write) -> bool:
        if write.cancelled:
            return False
        try:
            write.packed = self._chunks.write(write.row.file_id, write.key, write.obj, fsync=self._fsync)
        except OSError as error:
            self.breaker.failed()
            self._fail(f"write_{errno_name(error)}", "writing a chunk", error)
            return False
        except ValueError as error:
            self._fail("write_spec", "writing a chunk", error)
            return False
        except Exception as error:  # must not end the writer: the queue would fill up for good
            self._fail("write_internal", "writing a chunk", error)
            return False
        self.breaker.succeeded()
        return True

    def _unlink_file(self, doomed: Condemned) -> bool:
        try:
            self._chunks.unlink(doomed.file_id)
        except OSError as error:
            # The row stays too: the next run finds the chunk again.
            self._catalog.could_not_unlink(doomed)
            self._fail(f"unlink_{errno_name(error)}", "removing a chunk", error)
            return False
        return True

    def _persist(self) -> None:
        while (self._gone or self._catalog.has_used) and self._commit():
            pass

    def _commit(self, *, begun: Sequence[Write] = (), finished: Sequence[Write] = ()) -> bool:
        gone = self._gone[:ROWS_PER_COMMIT]
        try:
            self._index.commit(
                begun=[w.row for w in begun],
                finished=[w.row.file_id for w in finished],
                packed=[w.row._replace(packed=w.packed) for w in finished if w.packed != w.row.packed],
                gone=gone,
                used=self._catalog.take_used(ROWS_PER_COMMIT),
            )
        except sqlite3.Error as error:
            self.breaker.failed()
            self._fail("index", "updating the index", error)
            return False
        del self._gone[: len(gone)]
        return True

    def _fail(self, reason: str, doing: str, error: Exception) -> None:
        self._catalog.failed(reason)
        log_limited(logger, logging.WARNING, f"disk:{reason}", "disk tier: %s failed: %s", doing, error)


def errno_name(error: OSError) -> str:
    """Such as ``enospc``: a short word to count by."""
    return errno.errorcode.get(error.errno or 0, "error").lower()
