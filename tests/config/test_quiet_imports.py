"""Importing us starts nothing and brings no engine along."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

REPORT = """
import json, sys, threading
import {module}
torch = sys.modules.get("torch")
print(json.dumps({{
    "threads": [thread.name for thread in threading.enumerate()],
    "cuda": bool(torch and torch.cuda.is_initialized()),
    "modules": sorted({{name.partition(".")[0] for name in sys.modules}}),
}}))
"""

WITHOUT_TORCH = ["lmcache", "lmcache.config", "lmcache.cli.main", "lmcache.observability.metrics"]
WITH_TORCH = ["lmcache.keys", "lmcache.metadata", "lmcache.cache_engine", "lmcache.manager"]


@pytest.mark.parametrize("module", WITHOUT_TORCH + WITH_TORCH)
def test_import_starts_nothing(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(module=module)], capture_output=True, text=True, check=True, timeout=120
    )
    seen = json.loads(done.stdout)
    assert seen["threads"] == ["MainThread"]
    assert not seen["cuda"]
    assert not {"vllm", "sglang", "transformers"} & set(seen["modules"])
    if module in WITHOUT_TORCH:
        assert "torch" not in seen["modules"]
    assert done.stderr == ""


def test_the_package_itself_imports_next_to_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(module="lmcache")], capture_output=True, text=True, check=True, timeout=120
    )
    assert not {"numpy", "pydantic", "prometheus_client", "yaml", "rich"} & set(json.loads(done.stdout)["modules"])
