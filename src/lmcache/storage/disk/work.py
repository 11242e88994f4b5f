"""Chunks on their way to and from the disk: what the catalog hands to the threads that do the I/O."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import MemoryObj
from lmcache.storage.disk.entries import Entry
from lmcache.storage.disk.write_queue import Write


@dataclass(eq=False)
class Read:
    """A chunk to be read, and everyone who waits for it."""

    key: CacheKey
    entry: Entry
    futures: list[Future[MemoryObj | None]] = field(default_factory=list)
    forgotten: bool = False


class Condemned(NamedTuple):
    """A file to be removed. Its ``charge`` is already promised to others, who are written after it is gone."""

    file_id: int
    charge: int


@dataclass(frozen=True)
class Work:
    """What the writer is to do next: remove files, or else write files. Neither after an idle while."""

    condemned: list[Condemned] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
