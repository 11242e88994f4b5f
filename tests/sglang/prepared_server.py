"""Servers for tests, forked from a Python that has SGLang imported: 10 seconds of a core each in place of 55.

What users start, ``python -m sglang.launch_server`` and processes that it spawns, is
:func:`tests.sglang.server.sglang_server`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any, cast

from demo.server import ENVIRONMENT, EngineServer
from demo.sglang.server import SHIMS, SGLangServer
from tests.sglang.fork_children import fork_children
from tests.sglang.server import REPOSITORY


class PreparedServer(SGLangServer):
    """``module`` is run as if by ``python -m``, with ``--host``, ``--port`` and ``arguments``."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        EngineServer.__init__(self, module, arguments, environment, log)

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        _, _, module, *arguments = self._command
        process = _prepared().Process(target=_serve, args=(module, arguments, self._environment, log.name))
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


@cache
def _prepared() -> Any:
    """Forks the servers, and has no threads itself."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SHIMS), str(REPOSITORY / "src"), str(REPOSITORY)])
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.sglang.imported"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _serve(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """In the process that was forked."""
    os.setsid()
    with open(log, "ab") as output, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    fork_children()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
