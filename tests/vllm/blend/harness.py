"""Runs a scenario of :mod:`tests.vllm.blend.scenarios` for several models in one process of its own.

vLLM takes ten times as long to import as to load a small model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.vllm.harness import REPOSITORY, VLLM_ENVIRONMENT


def run(scenario: str, names: list[str], **environ: str) -> dict[str, Any]:
    """What the scenario answers, by model; AssertionError with the log's tail when it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.json")
        process = subprocess.run(
            [sys.executable, "-m", "tests.vllm.blend.scenarios", scenario, str(result), *names],
            env={**os.environ, **VLLM_ENVIRONMENT, **environ},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=550,
            check=False,
        )
        tail = "\n".join(process.stdout.splitlines()[-60:])
        assert process.returncode == 0, f"{scenario} ended with {process.returncode}:\n{tail}"
        answer: dict[str, Any] = json.loads(result.read_text())
        return answer
