"""Runs a scenario on a real vLLM in a process of its own: its state (kernels, process groups, connector) is global.

``run(scenario, …)`` calls the function ``scenario`` of :mod:`scenarios` and gives back what it returns, through JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.prepared_python import REPOSITORY, prepared, run_as_main
from tests.shallow_model import shallow_copy

VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # vLLM imports thousands of modules: let them be compiled once
}


def model_path() -> Path:
    """The real SmolLM2-135M-Instruct, as ``make`` prepares it."""
    return Path(os.environ.get("SMOLLM2_PATH", REPOSITORY / ".cache" / "models" / "smollm2-bfloat16"))


def run(
    scenario: str,
    *,
    module: str = "tests.vllm.scenarios",
    timeout: float = 900,
    environ: dict[str, str] | None = None,
    fresh: bool = False,
    second_runner: bool = False,
    shallow: bool = False,
    **arguments: Any,
) -> Any:
    """The result of ``module.<scenario>(**arguments)``; AssertionError with the log's tail when it failed.

    ``fresh``: in a Python that shares nothing with that of another scenario, not even the seed of ``hash``, and ends as
    one does. ``second_runner``: see :mod:`tests.vllm.second_runner`; all scenarios are run so where the environment has
    ``VLLM_TESTS_ON_SECOND_RUNNER``. ``shallow``: with :mod:`tests.shallow_model`.
    """
    if shallow:
        environ = {**(environ or {}), "SMOLLM2_PATH": str(shallow_copy(model_path()))}
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.json")
        asked = [scenario, json.dumps(arguments), str(result)]
        if second_runner or "VLLM_TESTS_ON_SECOND_RUNNER" in os.environ:
            module, asked, fresh = "tests.vllm.second_runner", [module, *asked], True
        log = run_module(module, asked, environ=environ, timeout=timeout, fresh=fresh)
        answer = json.loads(result.read_text())
        answer["log"] = log
        return answer


def run_module(
    module: str, arguments: list[str], *, environ: dict[str, str] | None = None, timeout: float, fresh: bool = False
) -> str:
    """What ``python -m module …`` prints; AssertionError with its tail when it does not end with 0."""
    environ = {**os.environ, **VLLM_ENVIRONMENT, **(environ or {})}
    with tempfile.NamedTemporaryFile() as output:
        log = Path(output.name)
        run_one = _in_fresh_python if fresh else _in_prepared_python
        code = run_one(module, arguments, environ, log, timeout)
        printed = log.read_text(errors="replace")
    tail = "\n".join(printed.splitlines()[-60:])
    assert code == 0, f"{' '.join([module, *arguments])} ended with {code}:\n{tail}"
    return printed


def _in_fresh_python(
    module: str, arguments: list[str], environ: dict[str, str], log: Path, timeout: float
) -> int | None:
    with log.open("w") as output:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command, env=environ, cwd=REPOSITORY, stdout=output, stderr=output, timeout=timeout, check=False
        ).returncode


def _in_prepared_python(
    module: str, arguments: list[str], environ: dict[str, str], log: Path, timeout: float
) -> int | None:
    context = prepared("tests.vllm.imported", VLLM_ENVIRONMENT)
    process = context.Process(target=run_as_main, args=(module, arguments, environ, str(log)))
    process.start()
    try:
        process.join(timeout)
        code: int | None = process.exitcode
        assert code is not None, f"{' '.join([module, *arguments])} took more than {timeout:.0f} s"
        return code
    finally:
        if process.exitcode is None and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
