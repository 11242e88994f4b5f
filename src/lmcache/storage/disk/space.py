"""How many bytes everything in the directory may take: the figures behind "never over capacity, not for an instant"."""

from __future__ import annotations

import os
from pathlib import Path

from lmcache.storage.disk.chunk_file import chunk_file_bytes
from lmcache.storage.disk.direct_io import BLOCK, round_up
from lmcache.storage.disk.index import INDEX_FILE, WAL_BYTES

NUM_SHARDS = 256

_DIRECTORY_BYTES = (NUM_SHARDS + 2) * BLOCK
_EMPTY_BYTES = _DIRECTORY_BYTES + 64 * 1024
FIXED_BYTES = round_up(WAL_BYTES + _EMPTY_BYTES)
"""Set aside whatever the tier holds: the write-ahead log, 258 directories of one block, lock file, an empty index."""

ENTRY_METADATA_BYTES = 1024
"""For each entry: a row of the index (about 250 bytes) and a directory entry (about 40), both in trees that may be
half empty. Neither the index nor directories shrink, so the greatest number of entries ever counts."""


class SpaceRules:
    """What a chunk of a size costs in one directory. ``limit`` is what chunks and their metadata may take together."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self.limit = capacity_bytes - FIXED_BYTES
        self._block = max(BLOCK, os.statvfs(directory).f_frsize)
        self._directory = directory

    def charge(self, nbytes: int) -> int:
        """Bytes set aside for a chunk: its file in whole blocks of the file system, and one more block, which a file
        in many pieces takes for the list of its pieces."""
        return round_up(chunk_file_bytes(nbytes), self._block) + self._block

    def metadata_rows_found(self) -> int:
        """How many entries' worth of metadata the directory has at this moment, held by earlier runs."""
        sizes = [_bytes_on_disk(p) for p in self._directory.iterdir() if p.is_dir()]
        sizes.append(_bytes_on_disk(self._directory / INDEX_FILE))
        return -(-max(0, sum(sizes) - _EMPTY_BYTES) // ENTRY_METADATA_BYTES)


def _bytes_on_disk(path: Path) -> int:
    found = path.stat()
    return max(found.st_size, found.st_blocks * 512)
