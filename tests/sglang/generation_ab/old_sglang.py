"""Where the older versions of SGLang are, and how their code is run.

Their sources are unpacked (`scripts/fetch_sglang_sources.py`), not installed: the radix caches are plain Python, and
run in the environment of the newer SGLang.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
VERSIONS = {"A": "0.5.12", "MP": "0.5.17", "IP": "0.5.17"}
"""By what SGLang makes of us: generation A; generation B in two phases, and layerwise."""


def python() -> str:
    """A Python in which SGLang runs."""
    if "SGLANG_PYTHON" not in os.environ:
        pytest.skip("SGLANG_PYTHON names no environment with SGLang; run `make test-sglang`")
    return os.environ["SGLANG_PYTHON"]


def source(version: str) -> Path:
    """The unpacked sources of an older SGLang."""
    folder = Path(os.environ.get("SGLANG_SOURCES", REPOSITORY / ".cache" / "sglang-sources"), version)
    if not (folder / "sglang" / "__init__.py").exists():
        pytest.skip(f"no sources of SGLang {version} in {folder}; run `make test-sglang`")
    return folder


def run(
    scenario: str,
    mode: str,
    *,
    module: str = "tests.sglang.generation_ab.scenarios",
    environ: dict[str, str] | None = None,
    **arguments: Any,
) -> Any:
    """What ``module.<scenario>(mode, **arguments)`` gives in a fresh process with the SGLang of ``mode``: an older one,
    or with "installed" that of the environment."""
    older = [] if mode == "installed" else [str(source(VERSIONS[mode]))]
    paths = [str(REPOSITORY / "src"), str(REPOSITORY), *older]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
    command = [python(), "-W", "ignore", "-m", module]
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.json")
        process = subprocess.run(
            [*command, scenario, mode, json.dumps(arguments), str(result)],
            env={**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **(environ or {})},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
            check=False,
        )
        tail = "\n".join(process.stdout.splitlines()[-60:])
        assert process.returncode == 0, f"{scenario} ended with {process.returncode}:\n{tail}"
        return json.loads(result.read_text())
