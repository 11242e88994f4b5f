"""Taking possession of a directory: from whatever an earlier run left to a sound index that fits the capacity."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmcache.keys import CacheKey
from lmcache.observability.logging import init_logger
from lmcache.storage.chunk_format import PLAINTEXT, ChunkFormat
from lmcache.storage.disk.catalog import Catalog
from lmcache.storage.disk.chunk_directory import ChunkDirectory
from lmcache.storage.disk.chunk_file import PLAIN
from lmcache.storage.disk.index import INDEX_FILE, ROWS_PER_COMMIT, DiskIndex, IndexDamagedError, IndexRow
from lmcache.storage.disk.lock import DirectoryLock
from lmcache.storage.disk.settings import DiskSettings, DiskTierError
from lmcache.storage.disk.space import FIXED_BYTES, SpaceRules
from lmcache.storage.disk.work import Condemned
from lmcache.storage.disk.writer import DiskWriter
from lmcache.storage.policies.interface import EvictionPolicy

logger: logging.Logger = init_logger(__name__)


@dataclass(frozen=True)
class OpenDirectory:
    """A directory that is ours, within its capacity, and whose writer has not started yet."""

    lock: DirectoryLock
    chunks: ChunkDirectory
    index: DiskIndex
    catalog: Catalog
    writer: DiskWriter


def open_directory(
    settings: DiskSettings, policy: EvictionPolicy[CacheKey], chunk_format: ChunkFormat = PLAIN
) -> OpenDirectory:
    """Raises:
    DiskTierError: the directory cannot be used, or is in use by another process.
    """
    directory = settings.directory
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = DirectoryLock(directory, timeout=settings.lock_timeout)
    except OSError as error:
        raise _unusable(directory, error) from error
    try:
        return _open(settings, policy, lock, chunk_format)
    except (OSError, sqlite3.Error) as error:
        lock.release()
        raise _unusable(directory, error) from error
    except BaseException:
        lock.release()
        raise


def _open(
    settings: DiskSettings, policy: EvictionPolicy[CacheKey], lock: DirectoryLock, chunk_format: ChunkFormat
) -> OpenDirectory:
    directory = settings.directory
    rules = SpaceRules(directory, settings.capacity_bytes)
    if rules.limit < rules.charge(1):
        raise DiskTierError(
            f"{settings.capacity_bytes} bytes for {directory} are too few: the index alone needs {FIXED_BYTES}; "
            "raise max_local_disk_size"
        )
    chunks = ChunkDirectory(directory, chunk_format)
    catalog = Catalog(rules, policy, settings.write_queue_bytes, chunk_format)
    unusable: list[int] = []
    in_the_clear = 0

    def sound_rows(index: DiskIndex) -> Iterator[IndexRow]:
        nonlocal in_the_clear
        for row in index.ready_rows():
            if isinstance(row, int):
                unusable.append(row)
            elif chunk_format.refusal(row.key_id) == PLAINTEXT:
                unusable.append(row.file_id)
                in_the_clear += 1
            else:
                yield row

    damaged = False
    index: DiskIndex | None = None
    try:
        index = DiskIndex(directory)
        catalog.restore(sound_rows(index), next_file_id=index.next_file_id, last_use=index.last_use)
        unusable += index.pending_ids()
    except IndexDamagedError as error:
        logger.warning("disk tier: the index in %s is damaged (%s); starting empty", directory, error)
        damaged = True
        if index is not None:
            index.close()
        for suffix in ("", "-wal", "-journal"):
            (directory / (INDEX_FILE + suffix)).unlink(missing_ok=True)
        index = DiskIndex(directory)
        catalog.clear()

    writer = DiskWriter(catalog, chunks, index, write_threads=settings.write_threads, fsync=settings.fsync)
    for start in range(0, len(unusable), ROWS_PER_COMMIT):
        writer.unlink([Condemned(file_id, charge=0) for file_id in unusable[start : start + ROWS_PER_COMMIT]])
    catalog.evict_to_limit(rules.metadata_rows_found())
    writer.unlink_condemned()
    if damaged:
        writer.sweep()
    if in_the_clear:
        logger.warning("disk tier: %d chunks in %s were not encrypted; they are removed", in_the_clear, directory)
    if catalog.num_locked:
        logger.warning(
            "disk tier: %d chunks in %s are encrypted with keys that are not here; they stay until room is needed",
            catalog.num_locked,
            directory,
        )
        catalog.failed("start_no_key", catalog.num_locked)
    return OpenDirectory(lock, chunks, index, catalog, writer)


def _unusable(directory: Path, error: Exception) -> DiskTierError:
    return DiskTierError(
        f"local_disk {directory} cannot be used: {error}; "
        "name a directory on a local disk that this user may write, with free space"
    )
