"""What a user may decide about the disk tier, and the error that says a directory cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class DiskTierError(Exception):
    """The directory cannot hold the disk tier. The message names the path, the cause and what to do about it."""


@dataclass(frozen=True)
class DiskSettings:
    """Where the tier lies and how much it may do at a time.

    Attributes:
        directory: created when missing. One process at a time.
        capacity_bytes: bound on everything under ``directory``: chunks, unfinished files, index, directories.
        fsync: force each chunk to the medium before it counts as stored. Off, a power loss may cost the newest
            entries (a checksum finds them out); a crash of the process costs nothing either way.
        read_threads: reads under way at once.
        write_threads: chunks written at once.
        write_queue_bytes: host memory that chunks waiting to be written may hold; beyond it puts are dropped.
        close_timeout: seconds that :meth:`LocalDiskTier.close` gives to chunks waiting to be written.
        lock_timeout: seconds that whoever has the directory gets to let go of it. A server that is on its way out still
            has it, and so has what was forked from it until it runs another program.
    """

    directory: Path
    capacity_bytes: int
    fsync: bool = False
    read_threads: int = 4
    write_threads: int = 2
    write_queue_bytes: int = 1 << 30
    close_timeout: float = 10.0
    lock_timeout: float = 1.0

    def __post_init__(self) -> None:
        for name in ("capacity_bytes", "read_threads", "write_threads", "write_queue_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("close_timeout", "lock_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more seconds")
