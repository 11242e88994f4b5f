"""A real Redis as a child process."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from demo.fleet.standstill import go_on, stand_still


class RedisMissingError(RuntimeError):
    """There is no redis-server on this machine."""


class RedisServer:
    """``with RedisServer(folder) as server:`` runs it, on a free port that stays its own also when it is killed and
    started again. Keeps nothing on disk.

    ``arguments`` go to its command line; ``program`` may be another that speaks the same, ``valkey-server`` say.
    """

    def __init__(self, folder: Path, arguments: Sequence[str] = (), program: str = "redis-server") -> None:
        found = shutil.which(program)
        if found is None:
            raise RedisMissingError(f"{program} is needed; on Debian: apt-get install redis-server")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.socket = folder / "redis.sock"
        self._log = folder / "redis.log"
        self._command = [
            *(found, "--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", str(self.socket)),
            *("--dir", str(folder), "--save", "", "--appendonly", "no", "--logfile", str(self._log), *arguments),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it takes connections."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(500):
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(self.socket)) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        log = self._log.read_text() if self._log.exists() else ""
        raise RuntimeError(f"redis-server did not start: {' '.join(self._command)}\n{log[-2000:]}")

    def kill(self) -> None:
        """As the out-of-memory killer does. All that it held is gone. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It takes connections, and answers nothing."""
        assert self._process is not None
        stand_still(self._process.pid)

    def resume(self) -> None:
        assert self._process is not None
        go_on(self._process.pid)

    def num_keys(self) -> int:
        return int(self._ask(b"DBSIZE")[1:])

    def wait_until_quiet(self, seconds: float = 0.5, timeout: float = 30.0) -> None:
        """Until nothing was written for so long, or the time is up."""
        deadline = time.monotonic() + timeout
        before, since = -1, time.monotonic()
        while time.monotonic() < deadline:
            now = self.num_keys()
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since >= seconds:
                return
            time.sleep(0.05)

    def _ask(self, command: bytes) -> bytes:
        """The reply to a command whose reply is one line."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.socket))
            connection.sendall(command + b"\r\n")
            return connection.makefile("rb").readline().strip()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def free_port() -> int:
    # A cluster's nodes also use the port 10,000 above.
    while True:
        port = random.randrange(20_000, 45_000)
        with contextlib.suppress(OSError), socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port
