"""Kernels that the interpreter runs are compiled for a GPU too, which need not be there."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.kernels.needs_triton import require

require()


def test_every_variant_becomes_machine_code() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
