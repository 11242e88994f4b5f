"""Reading and writing whole buffers, past the page cache where the file system allows it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

BLOCK = 4096
"""O_DIRECT wants addresses, lengths and offsets to be multiples of the device's block: 4096 suits all in use."""

# Not defined where the platform has no O_DIRECT (macOS); then every file is buffered.
O_DIRECT: int = getattr(os, "O_DIRECT", 0)


def round_up(nbytes: int, block: int = BLOCK) -> int:
    return -(-nbytes // block) * block


def aligned_buffer(nbytes: int = BLOCK) -> memoryview:
    """Zeroed memory that starts on a page boundary."""
    return memoryview(mmap.mmap(-1, nbytes))


def supports_direct_io(directory: Path) -> bool:
    """Whether files in ``directory`` can be written and read with O_DIRECT (tmpfs and overlays may refuse).

    Raises:
        OSError: files there cannot be written at all.
    """
    path = directory / "probe"
    buffer = aligned_buffer()
    # Buffered first: if this fails the directory is unusable, and the error says why.
    path.write_bytes(buffer)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | O_DIRECT)
        try:
            write_all(fd, [buffer])
            read_all(fd, [buffer])
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return False
    finally:
        path.unlink()
    return O_DIRECT != 0


def write_all(fd: int, buffers: Sequence[memoryview]) -> None:
    """Write ``buffers`` one after the other from the start of the file.

    Raises:
        OSError: the medium refused; some of the bytes may have been written.
    """
    done = 0
    while rest := _after(buffers, done):
        done += os.pwritev(fd, rest, done)


def read_all(fd: int, buffers: Sequence[memoryview], start: int = 0) -> None:
    """Fill ``buffers`` one after the other with what begins at ``start`` in the file.

    Raises:
        OSError: the medium failed.
        EOFError: the file ends before the buffers are full.
    """
    done = 0
    while rest := _after(buffers, done):
        got = os.preadv(fd, rest, start + done)
        if got == 0:
            raise EOFError(f"file ends after {start + done} bytes")
        done += got


def _after(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of ``buffers`` when the first ``done`` bytes are dealt with."""
    rest = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:])
        done = max(0, done - len(buffer))
    return rest
