"""``make demo-fleet``: real servers, a real Redis that is killed; no request fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.harness import REPOSITORY, model_path

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="apt-get install redis-server"),
]


def test_two_servers_share_and_outlive_a_redis(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo.fleet", "--model", str(model_path()), "--work", str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "result.json").read_text())
    assert {row["server"] for row in rows} == {"A", "B"}
    assert all(row["answer"]["text"].strip() for row in rows)
    assert sum(row["answer"]["tokens_by_tier"].get("remote", 0) > 0 for row in rows if row["server"] == "B") == 3
