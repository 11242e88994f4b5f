"""An ``lmcache server`` for a benchmark's engine, with as much memory as the other variants have in the process."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start_server(gib: float) -> Path:
    """Its socket. It ends with this process, however that ends."""
    socket = Path(tempfile.mkdtemp(prefix="server-"), "kv.sock")
    server = subprocess.Popen(
        [sys.executable, "-m", "lmcache.cli", "server", "--socket", str(socket)],
        env={**os.environ, "LMCACHE_MAX_LOCAL_CPU_SIZE": str(gib)},
        stdout=subprocess.PIPE,
        preexec_fn=_end_with_parent,  # the benchmark has no other thread yet
    )
    assert server.stdout is not None
    if not server.stdout.readline():
        raise RuntimeError(f"lmcache server did not start: it ended with {server.wait()}")
    return socket


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
