"""One process per directory: an ``flock`` that the kernel gives back when the process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from pathlib import Path

from lmcache.storage.disk.settings import DiskTierError

LOCK_FILE = "lock"


class DirectoryLock:
    """Held from construction to :meth:`release`."""

    def __init__(self, directory: Path, *, shared: bool = False, timeout: float = 0.0) -> None:
        """``shared``: with others that only read. ``timeout``: seconds that whoever has the directory gets to let go.

        Raises:
            DiskTierError: another process, or another tier of this one, has the directory.
            OSError: the lock file cannot be opened or locked.
        """
        self._fd: int | None = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _locked(self._fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, timeout):
                owner = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise DiskTierError(
                    f"{directory} is in use by process PID {owner}; give each server its own local_disk"
                )
        except Exception:
            self.release()
            raise
        if not shared:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        _held.add(self)

    def release(self) -> None:
        """Idempotent. The file stays: removing it would let two processes lock two different files."""
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is not None:
            os.close(fd)


def _locked(fd: int, kind: int, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not _try_lock(fd, kind):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _release_in_child() -> None:
    # A forked child shares the lock and would keep it after its parent died. Closing the child's copy alone
    # does not unlock it for the parent.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
