"""Where the older versions of SGLang are, and how their code is run.

Their sources are unpacked (`scripts/fetch_sglang_sources.py`), not installed: the radix caches are plain Python, and
run in the environment of the newer SGLang.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.prepared_python import REPOSITORY
from tests.sglang.generation_ab.forking_python import ForkingPython

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


def run(scenario: str, mode: str, *, module: str = "tests.sglang.generation_ab.scenarios", **arguments: Any) -> Any:
    """What ``module.<scenario>(mode, **arguments)`` gives in a process of its own with the SGLang of ``mode``: an older
    one, or with "installed" that of the environment."""
    older = [] if mode == "installed" else [str(source(VERSIONS[mode]))]
    paths = [str(REPOSITORY / "src"), str(REPOSITORY), *older]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    which = module, *paths
    if which not in _forking:
        _forking[which] = ForkingPython(python(), module, environment)
    return _forking[which].run(scenario, mode, arguments, environment, timeout=500)


_forking: dict[tuple[str, ...], ForkingPython] = {}
