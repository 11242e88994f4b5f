"""A wall clock of a server's own, which can jump; its monotonic clock goes on as ever."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("wall_clock.c")


class WallClock:
    """Without a C compiler it cannot jump."""

    def __init__(self, offset: Path) -> None:
        self._offset = offset
        self._library = offset.with_suffix(".so")
        self._offset.write_bytes(bytes(8))
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(self._library), str(_SOURCE)]
        try:
            self.can_jump = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            self.can_jump = False

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to live by this clock."""
        return {"LD_PRELOAD": str(self._library), "WALL_CLOCK_OFFSET": str(self._offset)} if self.can_jump else {}

    def jump_to(self, seconds: int) -> None:
        """So far before or behind the machine's clock, at once."""
        with self._offset.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))
