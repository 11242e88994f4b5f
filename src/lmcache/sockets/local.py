"""Unix sockets in a directory that only this user may enter, and who is at the other end of one."""

from __future__ import annotations

import os
import socket
import stat
import struct
import tempfile
from pathlib import Path

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def private_directory() -> Path:
    """Where the sockets of this user lie; made if it is not there.

    Raises:
        OSError: the directory cannot be made, or is not ours alone.
    """
    parent = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    directory = parent / f"lmcache-{os.getuid()}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except PermissionError:  # a runtime directory of another user, inherited through su or sudo
        directory = Path(tempfile.gettempdir()) / f"lmcache-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{directory} must be a directory that belongs to this user and is closed to all others")
    return directory


def listen(path: Path, in_use: str = "another process listens there") -> socket.socket:
    """A listening socket at ``path``, which only this user may connect to. What a process that died left there is
    removed.

    Raises:
        OSError: the path is in use by a living process (``in_use`` says what that means), or cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink(missing_ok=True)
                else:
                    raise FileExistsError(f"{path} is in use: {in_use}")
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def peer_uid(connection: socket.socket) -> int | None:
    """The user that the process at the other end runs as, as the kernel says; None where it does not say."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None  # not Linux: the directory's permissions have to do
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return int(uid)


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as our user."""
    return peer_uid(connection) in (None, os.getuid())
