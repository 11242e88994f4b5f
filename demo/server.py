"""A real LLM server as a child process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import httpx
from typing_extensions import Self

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # engines import thousands of modules: let them be compiled once
}


class ServerFailedError(RuntimeError):
    """The server ended, or did not get ready in time. The message holds the end of its log."""


class EngineServer:
    """``with EngineServer(module, …) as server:`` starts the server; leaving the block ends it and all its children.

    Entering returns at once; :meth:`wait_until_ready` waits. ``module`` is run with ``--host``, ``--port`` and
    ``arguments``; ``environment`` adds to ours; None takes a variable out.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str | None], log: Path) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        variables = {**os.environ, **ENVIRONMENT, **environment}
        self._environment = {name: value for name, value in variables.items() if value is not None}
        self._command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(self.port), *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            log.write(f"$ {' '.join(self._command)}\n".encode())
            log.flush()
            self._process = self._start(log)
        return self

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """In a session of its own, so that the engine's processes can be ended with it."""
        return subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_session(self._process.pid)
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        """As the out-of-memory killer does, with all its children. Idempotent."""
        if self._process is not None:
            _kill_session(self._process.pid)
            self._process.wait()
            self._process = None

    def wait_until_ready(self, show: Callable[[str], None], timeout: float = 600) -> float:
        """Seconds until the server answered. ``show`` gets the last line of its log now and then.

        Raises:
            ServerFailedError: the server ended, or ``timeout`` seconds went by.
        """
        start = time.monotonic()
        while time.monotonic() - start < timeout:
            if self._process is None or self._process.poll() is not None:
                raise ServerFailedError(f"the server ended before it was ready\n{self.log_tail()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).is_success:
                    return time.monotonic() - start
            except httpx.TransportError:
                pass
            show(self.log_tail(1))
            time.sleep(0.5)
        raise ServerFailedError(f"the server was not ready after {timeout:.0f} s\n{self.log_tail()}")

    def log_tail(self, lines: int = 40) -> str:
        text = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(text[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
