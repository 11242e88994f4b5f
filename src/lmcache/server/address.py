"""Where a server of this host is found."""

from __future__ import annotations

from pathlib import Path

from lmcache.sockets.local import private_directory

DEFAULT_PORT = 5555
"""vLLM's, for connectors that reach their server by TCP."""

_HERE = ("localhost", "127.0.0.1", "::1", "[::1]", "0.0.0.0", "")
_FILE_SCHEMES = ("unix", "ipc", "file")


def default_socket(port: int = DEFAULT_PORT) -> Path:
    """``server.sock`` in this user's own directory, ``server-PORT.sock`` for another port than vLLM's default.

    Raises:
        OSError: the directory cannot be made, or is not ours alone.
    """
    return private_directory() / ("server.sock" if port == DEFAULT_PORT else f"server-{port}.sock")


def socket_for(host: object = None, port: object = None) -> Path:
    """The socket that stands for a host and port as vLLM's users write them: a path, or ``unix://`` and a path, is that
    socket; this host, by whatever name, is :func:`default_socket` of the port.

    Raises:
        ValueError: it is another host, which cannot share our memory, or no port.
        OSError: see :func:`default_socket`.
    """
    scheme, separator, name = str(host or "localhost").strip().rpartition("://")
    if scheme in _FILE_SCHEMES or (not separator and name.startswith("/")):
        return Path(name)
    if name not in _HERE:
        raise ValueError(
            f"lmcache.mp.host={host!r}: a cache server shares memory with its engines, so it runs on their host; "
            "give localhost, or the path of its socket (for several hosts there is remote_url)"
        )
    try:
        return default_socket(DEFAULT_PORT if port is None else int(str(port)))
    except ValueError:
        raise ValueError(f"lmcache.mp.port={port!r}: must be a number") from None
