"""``LocalDiskTier``: KV on a local disk, there again after a restart."""

from __future__ import annotations

import errno
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj
from lmcache.observability.logging import init_logger, log_limited
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.chunk_header import ChunkFormatError
from lmcache.storage.disk.chunk_file import PLAIN
from lmcache.storage.disk.opening import open_directory
from lmcache.storage.disk.settings import DiskSettings
from lmcache.storage.disk.work import Read
from lmcache.storage.disk.writer import errno_name
from lmcache.storage.interface import Allocate, StorageTier, TierStats
from lmcache.storage.policies.interface import EvictionPolicy

logger = init_logger(__name__)

# The process or the machine is short of something for now; the file itself may be sound.
_TRANSIENT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EAGAIN}


class LocalDiskTier(StorageTier):
    """One directory, one process. See the package's modules for the parts.

    Puts are written behind the caller's back; until then they are served from the host memory they wait in. A file
    that cannot be read or does not hold what it should is removed and counts as a miss.
    """

    name: ClassVar[str] = "disk"

    def __init__(
        self,
        settings: DiskSettings,
        allocate: Allocate,
        policy: EvictionPolicy[CacheKey],
        chunk_format: ChunkFormat = PLAIN,
    ) -> None:
        """Args:
        allocate: gives the host memory that chunks are read into.
        policy: an empty one of the tier's own.
        chunk_format: how chunks are written. Where it encrypts, chunks that lie there in the clear are removed.

        Raises:
            DiskTierError: the directory cannot be used, or is in use by another process.
        """
        opened = open_directory(settings, policy, chunk_format)
        self._lock, self._chunks, self._index = opened.lock, opened.chunks, opened.index
        self._catalog, self._writer = opened.catalog, opened.writer
        self._close_timeout = settings.close_timeout
        self._allocate = allocate
        self._pid = os.getpid()
        self._readers = ThreadPoolExecutor(settings.read_threads, thread_name_prefix="lmcache-disk-read")
        self._writer.start()

    def contains(self, key: CacheKey) -> bool:
        return key in self._catalog

    def submit_put(self, key: CacheKey, obj: MemoryObj) -> bool:
        if self._writer.breaker.allows():
            return self._catalog.admit(key, obj)
        self._catalog.drop()
        return False

    def submit_get(self, key: CacheKey) -> Future[MemoryObj | None]:
        future, read = self._catalog.begin_read(key)
        if read is not None:
            try:
                self._readers.submit(self._read, read)
            except RuntimeError:  # closed meanwhile
                self._catalog.end_read(read, None)
        return future

    def remove(self, key: CacheKey) -> bool:
        return self._catalog.remove(key)

    def pin(self, key: CacheKey) -> bool:
        return self._catalog.pin(key)

    def unpin(self, key: CacheKey) -> None:
        self._catalog.unpin(key)

    def keys(self) -> list[CacheKey]:
        return self._catalog.keys()

    def clear(self) -> int:
        return self._catalog.clear()

    def flush(self, timeout: float | None = None) -> bool:
        return self._catalog.flush(timeout)

    def stats(self) -> TierStats:
        return self._catalog.stats()

    def close(self) -> None:
        # The threads, and the right to the directory, stayed with the process that opened it.
        if os.getpid() != self._pid or not self._catalog.close():
            return
        if not self._catalog.flush(self._close_timeout):
            logger.warning("disk tier: closing with chunks not yet written; they are dropped")
        self._catalog.stop()
        self._readers.shutdown()
        self._writer.join()
        self._index.close()
        self._lock.release()

    def _read(self, read: Read) -> None:
        if self._catalog.closed:
            self._catalog.end_read(read, None)
            return
        obj, reason, forget = None, None, False
        try:
            obj = self._chunks.read(
                read.entry.file_id, read.key, read.entry.spec, self._allocate, packed=read.entry.packed
            )
        except ChunkFormatError as error:
            reason, forget = f"read_{error.reason}", True
            self._warn(reason, error)
        except OSError as error:
            reason, forget = f"read_{errno_name(error)}", error.errno not in _TRANSIENT
            self._warn(reason, error)
        except MemoryError as error:
            reason = "read_no_memory"
            self._warn(reason, error)
        except Exception as error:  # whatever `allocate` may raise: nothing of ours reaches the engine
            reason = "read_internal"
            self._warn(reason, error)
        self._catalog.end_read(read, obj, failure=reason, forget=forget)

    def _warn(self, reason: str, error: Exception) -> None:
        log_limited(logger, logging.WARNING, f"disk:{reason}", "disk tier: reading a chunk failed: %s", error)
