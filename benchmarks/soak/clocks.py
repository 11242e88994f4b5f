"""A wall clock of a server's own, which can jump; its monotonic clock goes on as ever."""

from __future__ import annotations

from pathlib import Path

LIBRARIES = tuple(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


class WallClock:
    """Debian's ``faketime`` makes it, where it is installed."""

    def __init__(self, offset: Path) -> None:
        self._offset = offset
        self.jump_to(0)

    @staticmethod
    def can_jump() -> bool:
        return bool(LIBRARIES)

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to live by this clock."""
        if not LIBRARIES:
            return {}
        return {
            "LD_PRELOAD": str(LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._offset),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def jump_to(self, seconds: int) -> None:
        """So far before or behind the machine's clock, a second from now."""
        part = self._offset.with_suffix(".part")
        part.write_text(f"{seconds:+d}\n")
        part.rename(self._offset)
