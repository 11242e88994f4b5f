"""Runs a scenario of :mod:`tests.vllm.blend.scenarios` for several models in one process of its own.

vLLM takes ten times as long to import as to load a small model.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.vllm.harness import run_module


def run(scenario: str, names: list[str], **environ: str) -> dict[str, Any]:
    """What the scenario answers, by model; AssertionError with the log's tail when it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.json")
        run_module("tests.vllm.blend.scenarios", [scenario, str(result), *names], environ=environ, timeout=550)
        answer: dict[str, Any] = json.loads(result.read_text())
        return answer
