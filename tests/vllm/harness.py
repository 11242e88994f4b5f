"""Runs a scenario on a real vLLM in a process of its own: its state (kernels, process groups, connector) is global.

``run(scenario, …)`` calls the function ``scenario`` of :mod:`scenarios` in a fresh Python and gives back what it
returns, through JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

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
    **arguments: Any,
) -> Any:
    """The result of ``module.<scenario>(**arguments)``; AssertionError with the log's tail when it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.json")
        process = subprocess.run(
            [sys.executable, "-m", module, scenario, json.dumps(arguments), str(result)],
            env={**os.environ, **VLLM_ENVIRONMENT, **(environ or {})},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        tail = "\n".join(process.stdout.splitlines()[-60:])
        assert process.returncode == 0, f"{scenario} ended with {process.returncode}:\n{tail}"
        answer = json.loads(result.read_text())
        answer["log"] = process.stdout
        return answer
