"""The directory of another rank, or of an engine with another number of ranks: read, never written."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj
from lmcache.observability.logging import init_logger, log_limited
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.chunk_header import ChunkFormatError
from lmcache.storage.disk.chunk_directory import ChunkDirectory
from lmcache.storage.disk.chunk_file import PLAIN
from lmcache.storage.disk.index import IndexDamagedError, IndexRow, read_index
from lmcache.storage.disk.lock import DirectoryLock
from lmcache.storage.disk.settings import DiskTierError
from lmcache.storage.interface import Allocate, StorageTier, TierStats

logger = init_logger(__name__)


class ForeignDirectory(StorageTier):
    """What was in the directory when it was opened. Any number of processes may read it, while none writes."""

    name: ClassVar[str] = "foreign"

    def __init__(
        self,
        directory: Path,
        allocate: Allocate,
        read_threads: int,
        chunk_format: ChunkFormat = PLAIN,
        lock_timeout: float = 0.0,
    ) -> None:
        """``lock_timeout``: seconds that a process which writes it gets to let go of it.

        Raises:
            DiskTierError: the directory cannot be read, or a process writes it.
        """
        try:
            self._lock = DirectoryLock(directory, shared=True, timeout=lock_timeout)
        except OSError as error:
            raise DiskTierError(f"{directory} cannot be read: {error}") from error
        try:
            self._rows = {row.key: row for row in read_index(directory) if chunk_format.refusal(row.key_id) is None}
            self._chunks = ChunkDirectory.to_read(directory, chunk_format)
        except (OSError, sqlite3.Error, IndexDamagedError) as error:
            self._lock.release()
            raise DiskTierError(f"{directory} cannot be read: {error}") from error
        self._allocate = allocate
        self._used_bytes = sum(
            row.spec.nbytes if row.packed is None else row.packed.nbytes for row in self._rows.values()
        )
        self._mutex = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._readers = ThreadPoolExecutor(read_threads, thread_name_prefix="lmcache-foreign-read")

    def contains(self, key: CacheKey) -> bool:
        return key in self._rows

    def submit_put(self, key: CacheKey, obj: MemoryObj) -> bool:
        return False

    def submit_get(self, key: CacheKey) -> Future[MemoryObj | None]:
        row = self._rows.get(key)
        if row is not None:
            try:
                return self._readers.submit(self._read, row)
            except RuntimeError:  # closed meanwhile
                pass
        missing: Future[MemoryObj | None] = Future()
        missing.set_result(None)
        self._count("misses")
        return missing

    def _read(self, row: IndexRow) -> MemoryObj | None:
        try:
            obj = self._chunks.read(row.file_id, row.key, row.spec, self._allocate, packed=row.packed)
        except Exception as error:
            self._fault(row.key, error)
            self._count("misses")
            return None
        self._count("hits")
        return obj

    def _fault(self, key: CacheKey, error: Exception) -> None:
        if isinstance(error, ChunkFormatError):
            reason = f"read_{error.reason}"
        elif isinstance(error, OSError):
            reason = f"read_{errno.errorcode.get(error.errno or 0, 'unknown')}"
        else:
            reason = "read_internal"
        with self._mutex:
            self._failures[reason] += 1
        if not isinstance(error, MemoryError):
            self._rows.pop(key, None)  # the file is gone or damaged; it is not ours to remove
        log_limited(logger, logging.WARNING, f"foreign:{reason}", "reading a chunk of another rank failed: %s", error)

    def _count(self, what: str) -> None:
        with self._mutex:
            self._counts[what] += 1

    def remove(self, key: CacheKey) -> bool:
        return self._rows.pop(key, None) is not None

    def pin(self, key: CacheKey) -> bool:
        return key in self._rows  # nothing is evicted here

    def unpin(self, key: CacheKey) -> None:
        pass

    def keys(self) -> Sequence[CacheKey]:
        return list(self._rows)

    def clear(self) -> int:
        """The files stay."""
        rows, self._rows = self._rows, {}
        return len(rows)

    def flush(self, timeout: float | None = None) -> bool:
        return True

    def stats(self) -> TierStats:
        return TierStats(
            entries=len(self._rows),
            used_bytes=self._used_bytes,
            capacity_bytes=self._used_bytes,
            hits=self._counts["hits"],
            misses=self._counts["misses"],
            evictions=0,
            dropped_puts=0,
            failures=dict(self._failures),
        )

    def close(self) -> None:
        self._readers.shutdown()
        self._lock.release()
