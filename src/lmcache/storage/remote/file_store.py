"""``file://``: a directory on a file system that many machines share. Safe with many writers.

A value is a file, written under another name and then renamed: nobody sees half of one. What a writer that died left
behind is removed after a day.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from zlib import crc32

from lmcache.storage.remote.interface import RemoteStore, RemoteStoreError, StoreOptions, Value, Wanted

_UNFINISHED, _CLAIM = ".tmp", ".claim"
_ABANDONED_SECONDS = 86400.0
# At once, so that a deadline can be kept between two of them.
_SLICE = 16 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FileStore(RemoteStore):
    """Values as files in a tree; what would lie in one directory is spread over 256, so that none gets too large.

    A call that hangs in the file system cannot be interrupted: mount network file systems ``soft`` or with a timeout.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ValueError(f"remote_url={url!r}: must be file:///a/directory, with three slashes")
        if unknown := sorted(parse_qs(parts.query)):
            raise ValueError(f"remote_url={url!r}: file:// has no setting {', '.join(unknown)}")
        self.directory = Path(unquote(parts.path))
        self._writer = f"{socket.gethostname()}-{os.getpid()}"
        self._ttl = options.ttl_seconds

    def exists(self, names: Sequence[str], timeout: float) -> list[bool]:
        deadline = _Deadline(timeout)
        with _as_store_errors():
            return [self._is_there(deadline, self._path(name)) for name in names]

    def get(self, wanted: Sequence[Wanted], timeout: float) -> None:
        deadline = _Deadline(timeout)
        for name, receiver in wanted:
            with _as_store_errors(), contextlib.suppress(FileNotFoundError), open(self._path(name), "rb", 0) as file:
                if self._expired(os.fstat(file.fileno()).st_mtime):
                    continue
                size = os.fstat(file.fileno()).st_size
                head = bytearray(min(size, receiver.head_bytes))
                _read(file.fileno(), memoryview(head), deadline)
                memory = receiver.begin(size, memoryview(head))
                if memory is not None:
                    _read(file.fileno(), memory, deadline)
                    receiver.finish()

    def put(self, values: Sequence[Value], timeout: float) -> None:
        deadline = _Deadline(timeout)
        for name, parts in values:
            with _as_store_errors():
                self._write(self._path(name), parts, deadline)

    def delete(self, names: Sequence[str], timeout: float) -> None:
        deadline = _Deadline(timeout)
        for name in names:
            deadline.check()
            with _as_store_errors():
                self._path(name).unlink(missing_ok=True)

    def claim(self, names: Sequence[str], seconds: float, timeout: float) -> list[bool]:
        deadline = _Deadline(timeout)
        with _as_store_errors():
            return [self._claim(self._path(name), seconds, deadline) for name in names]

    def close(self) -> None: ...

    def _claim(self, path: Path, seconds: float, deadline: _Deadline) -> bool:
        if self._is_there(deadline, path):
            return False
        claim = path.with_name(path.name + _CLAIM)
        self._make_room(claim.parent)
        with contextlib.suppress(FileNotFoundError):
            if time.time() - claim.stat().st_mtime > seconds:
                claim.unlink()
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        if self._is_there(deadline, path):  # written, and its claim given back, since we looked
            claim.unlink(missing_ok=True)
            return False
        return True

    def _write(self, path: Path, parts: Sequence[memoryview], deadline: _Deadline) -> None:
        unfinished = path.with_name(f"{path.name}.{self._writer}-{secrets.token_hex(4)}{_UNFINISHED}")
        self._make_room(path.parent)
        try:
            with open(unfinished, "xb", 0) as file:
                os.fchmod(file.fileno(), 0o600)
                for part in parts:
                    _write(file.fileno(), part.cast("B"), deadline)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
            path.with_name(path.name + _CLAIM).unlink(missing_ok=True)
            self._tidy(path.parent)

    def _make_room(self, folder: Path) -> None:
        # What the directory lies in must be there: it may be a file system that is not mounted, and then its values
        # would silently fill another one.
        self.directory.mkdir(exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)

    def _tidy(self, directory: Path) -> None:
        """Now and then, remove what writers that died left in ``directory``, and values that are too old."""
        if secrets.randbelow(256):
            return
        for entry in os.scandir(directory):
            with contextlib.suppress(FileNotFoundError):
                age = time.time() - entry.stat().st_mtime
                unfinished = entry.name.endswith((_UNFINISHED, _CLAIM))
                if (unfinished and age > _ABANDONED_SECONDS) or (not unfinished and self._expired(time.time() - age)):
                    os.unlink(entry.path)

    def _is_there(self, deadline: _Deadline, path: Path) -> bool:
        deadline.check()
        try:
            return not self._expired(path.stat().st_mtime)
        except FileNotFoundError:
            return False

    def _expired(self, written_at: float) -> bool:
        return self._ttl is not None and time.time() - written_at > self._ttl

    def _path(self, name: str) -> Path:
        *folders, last = name.split("/")
        return self.directory.joinpath(*folders, f"{crc32(last.encode()) % 256:02x}", last)


class _Deadline:
    def __init__(self, timeout: float) -> None:
        self._at = time.monotonic() + timeout

    def check(self) -> None:
        if time.monotonic() > self._at:
            raise RemoteStoreError("timeout", "the file system did not answer in time")


def _read(fd: int, memory: memoryview, deadline: _Deadline) -> None:
    done = 0
    while done < memory.nbytes:
        deadline.check()
        count = os.readv(fd, [memory[done : done + _SLICE]])
        if count == 0:
            raise RemoteStoreError("short", "a file ended before its length", is_outage=False)
        done += count


def _write(fd: int, data: memoryview, deadline: _Deadline) -> None:
    done = 0
    while done < data.nbytes:
        deadline.check()
        done += os.write(fd, data[done : done + _SLICE])


@contextlib.contextmanager
def _as_store_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        word = errno.errorcode.get(error.errno or 0, "error").lower()
        raise RemoteStoreError(word, str(error), is_outage=error.errno not in _FULL) from error
