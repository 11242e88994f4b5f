"""Ways to hurt a cache directory while a server uses it. Leaving the context mends what can be mended."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def chunk_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*.kv") if path.is_file())


@contextmanager
def truncated(directory: Path) -> Iterator[None]:
    for path in chunk_files(directory):
        os.truncate(path, path.stat().st_size // 2)
    yield


@contextmanager
def bit_flipped(directory: Path) -> Iterator[None]:
    for path in chunk_files(directory):
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x10]))
    yield


@contextmanager
def swapped(directory: Path) -> Iterator[None]:
    """Every file holds a valid chunk, but another's."""
    files = chunk_files(directory)
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    yield


@contextmanager
def unlinked(directory: Path) -> Iterator[None]:
    for path in chunk_files(directory):
        path.unlink()
    yield


@contextmanager
def vanished(directory: Path) -> Iterator[None]:
    aside = directory.with_name(directory.name + ".aside")
    shutil.move(directory, aside)
    yield
    shutil.rmtree(directory, ignore_errors=True)
    shutil.move(aside, directory)


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """A read-only mount, which binds root too. ``directory`` must be a mount of its own."""
    subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=False)
    yield
    subprocess.run(["mount", "-o", "remount,rw", str(directory)], check=True)


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """No byte left on the file system. ``directory`` must be a small mount of its own."""
    filler = directory / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        except OSError:
            pass
    yield
    filler.unlink()
