"""Where the older versions of SGLang are, and how their code is run.

Their wheels are downloaded once and unpacked, not installed: the radix caches are plain Python, and run in the
environment of the newer SGLang.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
VERSIONS = {"A": "0.5.12", "MP": "0.5.17", "IP": "0.5.17"}
"""By what SGLang makes of us: generation A; generation B in two phases, and layerwise."""


def python() -> str:
    """A Python in which SGLang runs; ``SGLANG_PYTHON`` names another."""
    path = os.environ.get("SGLANG_PYTHON", str(REPOSITORY / ".cache" / "sglang" / "bin" / "python"))
    if not Path(path).exists():
        pytest.skip(f"no SGLang environment at {path}; set SGLANG_PYTHON")
    return path


@lru_cache
def source(version: str) -> Path:
    """The unpacked wheel; ``SGLANG_SOURCES`` names another folder to keep them in."""
    folder = Path(os.environ.get("SGLANG_SOURCES", REPOSITORY / ".cache" / "sglang-sources")) / version
    if not (folder / "sglang" / "__init__.py").exists():
        with tempfile.TemporaryDirectory() as wheels:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run([*command, "--dest", wheels, f"sglang=={version}"], check=False)
            if done.returncode:
                pytest.skip(f"sglang {version} cannot be downloaded")
            with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if not name.endswith(".so")])
    return folder


def run(scenario: str, mode: str, *, environ: dict[str, str] | None = None, **arguments: Any) -> Any:
    """What ``scenarios.<scenario>(mode, **arguments)`` gives in a fresh process with the SGLang of ``mode``."""
    paths = [str(REPOSITORY / "src"), str(REPOSITORY), str(source(VERSIONS[mode]))]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
    command = [python(), "-W", "ignore", "-m", "tests.sglang.generation_ab.scenarios"]
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
