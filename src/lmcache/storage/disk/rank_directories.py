"""One directory for an engine, folders in it for its ranks; and the folders of engines with other numbers of ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lmcache.keys import CacheKey
from lmcache.observability.logging import init_logger
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.disk.chunk_file import PLAIN
from lmcache.storage.disk.foreign import ForeignDirectory
from lmcache.storage.disk.index import INDEX_FILE
from lmcache.storage.disk.settings import DiskSettings, DiskTierError
from lmcache.storage.disk.tier import LocalDiskTier
from lmcache.storage.interface import Allocate
from lmcache.storage.policies.interface import EvictionPolicy

logger = init_logger(__name__)

_NAME = re.compile(r"rank-(\d{1,3})-of-(\d{1,3})")
_LOCK_SECONDS = 2.0


class RankDirectory(NamedTuple):
    """The folder of rank ``rank`` of ``world_size``. A single rank has the directory itself."""

    rank: int
    world_size: int
    path: Path

    @classmethod
    def of(cls, directory: Path, rank: int, world_size: int) -> RankDirectory:
        return cls(rank, world_size, directory if world_size == 1 else directory / f"rank-{rank}-of-{world_size}")

    @classmethod
    def at(cls, path: Path) -> RankDirectory:
        """Read from the folder's name."""
        named = _NAME.fullmatch(path.name)
        return cls(0, 1, path) if named is None else cls(int(named[1]), int(named[2]), path)

    def foreign(self) -> list[RankDirectory]:
        """The folders beside this one that hold chunks of another number of ranks.

        Raises:
            OSError: the directory cannot be listed.
        """
        base = self.path if self.world_size == 1 else self.path.parent
        if not base.is_dir():
            return []
        beside = [RankDirectory(0, 1, base)]
        beside += [RankDirectory.at(path) for path in sorted(base.iterdir()) if _NAME.fullmatch(path.name)]
        return [
            found for found in beside if found.world_size != self.world_size and (found.path / INDEX_FILE).is_file()
        ]


def open_foreign(
    found: RankDirectory,
    settings: DiskSettings,
    allocate: Allocate,
    make_policy: Callable[[], EvictionPolicy[CacheKey]],
    chunk_format: ChunkFormat = PLAIN,
) -> ForeignDirectory | None:
    """To read; None, with a word in the log, where that is not possible.

    Args:
        settings: what it may take on the disk at most; more than that is evicted first.
    """
    settings = replace(settings, directory=found.path, lock_timeout=0)
    try:
        # Whichever rank comes first evicts for all; those that read it since do not let go of it.
        LocalDiskTier(settings, allocate, make_policy(), chunk_format).close()
    except DiskTierError as error:
        logger.debug("%s is not looked through for what is too much: %s", found.path, error)
    try:
        # Another rank may be evicting.
        return ForeignDirectory(found.path, allocate, settings.read_threads, chunk_format, _LOCK_SECONDS)
    except DiskTierError as error:
        logger.warning("chunks of rank %d of %d are not used: %s", found.rank, found.world_size, error)
        return None
