"""How much to measure, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Attributes:
    runs: how often each figure is measured; its median is told.
    copy_bytes: what one run of a copy moves in host memory; several times the last cache of today's processors.
    disk_bytes: what one run writes and reads on disk.
    entries: numbers of indexed chunks, ascending.
    directory: where the disk benchmarks make their temporary directory.
    """

    runs: int
    copy_bytes: int
    disk_bytes: int
    entries: tuple[int, ...]
    directory: Path

    @classmethod
    def full(cls, directory: Path) -> Settings:
        return cls(11, 256_000_000, 512_000_000, (1_000, 10_000, 100_000, 1_000_000), directory)

    @classmethod
    def quick(cls, directory: Path) -> Settings:
        """A look that takes seconds: one size of index, and copies that fit into caches, so not the rates of memory."""
        return cls(2, 16_000_000, 32_000_000, (4_000,), directory)
