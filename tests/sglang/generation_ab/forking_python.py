"""Scenarios in processes that are forked by a Python with an SGLang imported, which takes 14 seconds of a core.

``python -m`` this with a module of scenarios: each line of JSON on the standard input asks for one, and a line on the
standard output says with which code it has ended.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.prepared_python import REPOSITORY, begin_anew


class ForkingPython:
    """One for all scenarios of ``module``; it ends with this process. One call at a time."""

    def __init__(self, python: str, module: str, environment: Mapping[str, str]) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="forking-python-")  # noqa: SIM115 - as long as this object
        self._process = subprocess.Popen(
            [python, "-W", "ignore", "-m", __name__, module],
            env=environment,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            text=True,
        )

    def run(
        self, scenario: str, mode: str, arguments: Mapping[str, Any], environment: Mapping[str, str], timeout: float
    ) -> Any:
        """What ``scenario(mode, **arguments)`` gives; AssertionError with the end of what it printed when it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as scratch:
            result, log = Path(scratch, "result.json"), Path(scratch, "log")
            asked = [scenario, mode, dict(arguments), dict(environment), str(result), str(log)]
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            ended, _, _ = select.select([self._process.stdout], [], [], timeout)
            code = self._process.stdout.readline().strip() if ended else f"nothing in {timeout:.0f} s"
            if not ended:
                os.killpg(self._process.pid, signal.SIGKILL)
            printed = log if log.exists() else Path(self._log.name)
            tail = "\n".join(printed.read_text(errors="replace").splitlines()[-60:])
            assert code == "0", f"{scenario} ended with {code or 'its Python'}:\n{tail}"
            return json.loads(result.read_text())


def _serve(module: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        scenarios = importlib.import_module(module)
    gc.freeze()  # no child is to look through what it shares with this process
    for line in iter(sys.stdin.readline, ""):
        scenario, mode, arguments, environment, result, log = json.loads(line)
        child = os.fork()
        if child == 0:  # which ends as any Python does
            begin_anew(environment, log)
            Path(result).write_text(json.dumps(getattr(scenarios, scenario)(mode, **arguments)))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
