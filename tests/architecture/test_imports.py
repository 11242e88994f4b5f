"""The dependency order of pyproject.toml's [tool.importlinter] holds, and the check can tell when it does not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


# Run in a copy, the copy's package must be found before the installed one.
LINT_IMPORTS = """
import sys
from importlinter.cli import lint_imports_command
sys.path.insert(0, "src")
lint_imports_command()
"""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT_IMPORTS, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_imports_point_down() -> None:
    result = lint_imports(REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(REPOSITORY / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "src" / "lmcache" / "keys.py").open("a") as file:
        file.write("\n\ndef _up() -> None:\n    import vllm\n\n    from lmcache import manager\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "lmcache.keys -> lmcache.manager" in result.stdout
    assert "lmcache.keys -> vllm" in result.stdout
