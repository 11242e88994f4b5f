"""A real server and real clients, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


class ServerProcess:
    """``lmcache server``, started; a context manager that ends it."""

    def __init__(self, socket: Path, **settings: object) -> None:
        self.socket = socket
        environ = {f"LMCACHE_{key.upper()}": str(value) for key, value in settings.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lmcache.cli", "server", "--socket", str(socket)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.05", **environ},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "listens" in line, line + self.process.stdout.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> str:
        """SIGTERM; gives what it has said. It must end well."""
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, said
        return said

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


class ClientProcess:
    """Runs a function of :mod:`tests.server.clients` and is spoken to over its pipes."""

    def __init__(self, function: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.clients", function, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
