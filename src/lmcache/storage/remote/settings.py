"""What a user may decide about a remote tier."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteSettings:
    """How much a remote tier may do at a time, and how long it may take.

    Attributes:
        timeout: seconds that a read or a write of chunks may take.
        lookup_timeout: seconds that a question whether chunks are there may take.
        read_threads: reads under way at once.
        write_threads: writes under way at once.
        write_queue_bytes: host memory that chunks waiting to be written may hold; beyond it puts are dropped.
        known_seconds: how long after a chunk was seen in the store it is not asked for again.
        close_timeout: seconds that closing gives to chunks waiting to be written.
    """

    timeout: float = 5.0
    lookup_timeout: float = 0.5
    read_threads: int = 4
    write_threads: int = 2
    write_queue_bytes: int = 1 << 29
    known_seconds: float = 60.0
    close_timeout: float = 10.0
