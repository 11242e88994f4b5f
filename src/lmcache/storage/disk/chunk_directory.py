"""Where chunk files lie: ``<shard>/<number>.kv``, and ``tmp/<number>`` while they are written.

Files are named by the number of their row, never by key: a file is written once under its name, so a late write or
removal of an earlier chunk cannot touch a later one of the same key.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.chunk_format import ChunkFormat
from lmcache.storage.disk.chunk_file import PLAIN, read_chunk, write_chunk
from lmcache.storage.disk.direct_io import supports_direct_io
from lmcache.storage.disk.packed import Packed
from lmcache.storage.disk.space import NUM_SHARDS
from lmcache.storage.interface import Allocate

_SUFFIX = ".kv"


class ChunkDirectory:
    """The files of one tier."""

    def __init__(self, root: Path, chunk_format: ChunkFormat = PLAIN) -> None:
        """Makes what is missing and removes unfinished files.

        Raises:
            OSError: the directory cannot be made or written.
        """
        self._root, self._format = root, chunk_format
        self._tmp = root / "tmp"
        self._tmp.mkdir(exist_ok=True, mode=0o700)
        for leftover in self._tmp.iterdir():
            leftover.unlink()
        self.direct = supports_direct_io(self._tmp)

    @classmethod
    def to_read(cls, root: Path, chunk_format: ChunkFormat = PLAIN) -> ChunkDirectory:
        """Nothing is made or removed; only :meth:`read` may be called."""
        directory = cls.__new__(cls)
        directory._root, directory._format = root, chunk_format
        directory._tmp = root / "tmp"
        directory.direct = False
        return directory

    def write(self, file_id: int, key: CacheKey, obj: MemoryObj, *, fsync: bool) -> Packed | None:
        """What :func:`write_chunk` says.

        Raises:
            OSError: the medium refused; call :meth:`unlink`, a part may be there.
        """
        unfinished, path = self._tmp / str(file_id), self._path(file_id)
        packed = write_chunk(unfinished, key, obj, direct=self.direct, fsync=fsync, chunk_format=self._format)
        try:
            unfinished.rename(path)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            unfinished.rename(path)
        return packed

    def read(
        self, file_id: int, key: CacheKey, spec: KVSpec, allocate: Allocate, *, packed: Packed | None = None
    ) -> MemoryObj:
        """Raises what :func:`read_chunk` raises."""
        path = self._path(file_id)
        return read_chunk(path, key, spec, allocate, direct=self.direct, packed=packed, chunk_format=self._format)

    def unlink(self, file_id: int) -> None:
        """Remove a file, finished or not. One that is not there is well.

        Raises:
            OSError: it is still there.
        """
        for path in (self._tmp / str(file_id), self._path(file_id)):
            with suppress(FileNotFoundError):
                path.unlink()

    def sweep(self, known: npt.NDArray[np.int64], stop: Callable[[], bool]) -> int:
        """Remove the files whose numbers are not among ``known`` (ascending); returns how many.

        ``stop`` is asked between directories.

        Raises:
            OSError: a directory cannot be listed or a file not removed.
        """
        removed = 0
        for shard in range(NUM_SHARDS):
            if stop():
                break
            with suppress(FileNotFoundError):
                removed += self._sweep_shard(self._shard(shard), known)
        return removed

    def _sweep_shard(self, shard: Path, known: npt.NDArray[np.int64]) -> int:
        found = _file_ids(shard)
        is_known = np.append(known, -1)[np.searchsorted(known, found)] == found
        orphans = found[~is_known].tolist()
        for file_id in orphans:
            self.unlink(file_id)
        return len(orphans)

    def _path(self, file_id: int) -> Path:
        return self._shard(file_id % NUM_SHARDS) / f"{file_id:x}{_SUFFIX}"

    def _shard(self, number: int) -> Path:
        return self._root / f"{number:02x}"


def _file_ids(shard: Path) -> npt.NDArray[np.int64]:
    ids = []
    for name in os.listdir(shard):
        stem, suffix = os.path.splitext(name)
        if suffix == _SUFFIX and len(stem) < 16:
            with suppress(ValueError):
                ids.append(int(stem, 16))
    return np.array(ids, dtype=np.int64)
