"""Where the ranks of an engine are found by its scheduler."""

from __future__ import annotations

import socket
from pathlib import Path

from blake3 import blake3

from lmcache.sockets import local


def socket_path(engine_id: str, rank: int) -> Path:
    """The same in every process of the engine; makes the directory.

    Raises:
        OSError: the directory cannot be made, or is not ours alone.
    """
    # Short, because the path of a Unix socket has room for about 100 bytes.
    return local.private_directory() / f"{blake3(engine_id.encode()).hexdigest(8)}-{rank}.sock"


def listen(path: Path) -> socket.socket:
    """As :func:`lmcache.sockets.local.listen`."""
    return local.listen(path, in_use="two engines on this host have the same engine_id")
