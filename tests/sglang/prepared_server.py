"""Servers for tests, forked from a Python that has SGLang imported: 10 seconds of a core each in place of 55.

What users start, ``python -m sglang.launch_server`` and processes that it spawns, is
:func:`tests.sglang.server.sglang_server`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from demo.server import ENVIRONMENT, EngineServer
from demo.sglang.server import SHIMS, SGLangServer
from tests.prepared_python import REPOSITORY, prepared, run_as_main
from tests.sglang.fork_children import fork_children

_PATHS = {"PYTHONPATH": os.pathsep.join(map(str, (SHIMS, REPOSITORY / "src", REPOSITORY)))}


_READ_WHEN_WANTED = {"SGLANG_CPU_OMP_THREADS_BIND"}


def _switches(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith("SGLANG_") and name not in _READ_WHEN_WANTED
    }


_SWITCHES_OF_ALL = _switches(os.environ)


class PreparedServer(SGLangServer):
    """``module`` is run as if by ``python -m``, with ``--host``, ``--port`` and ``arguments``.

    SGLang reads some of its switches when it is imported: a server for which a test sets one is not forked.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        EngineServer.__init__(self, module, arguments, {**_PATHS, **environment}, log)

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        if _switches(self._environment) != _SWITCHES_OF_ALL:
            return super()._start(log)
        _, _, module, *arguments = self._command
        context = prepared("tests.sglang.imported", {**ENVIRONMENT, **_PATHS})
        process = context.Process(target=_serve, args=(module, arguments, self._environment, log.name))
        process.start()
        return cast("subprocess.Popen[bytes]", _Started(process))


class _Started:
    """What :class:`demo.server.EngineServer` needs of a Popen."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid
        self.terminate = process.terminate

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if timeout is not None and self.poll() is None:
            raise subprocess.TimeoutExpired("SGLang", timeout)


def _serve(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    fork_children()
    run_as_main(module, arguments, environment, log)
