"""Measuring what can be measured only once in a process: importing, starting, growth of resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_CHILD = """
import json, sys
from importlib import import_module
module, function, arguments = sys.argv[1:]
print(json.dumps(getattr(import_module(module), function)(*json.loads(arguments))))
"""

Figures = dict[str, float]


def in_fresh_process(function: Callable[..., Figures], *arguments: str | int) -> Figures:
    """``function(*arguments)``, called in a new interpreter.

    Args:
        function: of the top level of its module.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote.
    """
    command = [sys.executable, "-c", _CHILD, function.__module__, function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{function.__module__}.{function.__name__} failed:\n{done.stderr[-4000:]}")
    figures: Figures = json.loads(done.stdout)
    return figures


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
