"""``file://``: a directory that many share."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lmcache.storage.remote import file_store
from lmcache.storage.remote.file_store import FileStore
from lmcache.storage.remote.interface import RemoteStoreError, StoreOptions
from tests.storage.remote.store_conformance import TIMEOUT, RemoteStoreConformance, got, value


class TestFileStore(RemoteStoreConformance):
    def make_store(self, tmp_path: Path, **options: Any) -> FileStore:
        return open_at(tmp_path, **options)


def open_at(tmp_path: Path, **options: Any) -> FileStore:
    return FileStore(f"file://{tmp_path}/kv", StoreOptions(**options))


@pytest.mark.parametrize("url", ["file://share/kv", "file:kv", "file:///kv?mode=fast"])
def test_a_url_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(ValueError, match="remote_url="):
        FileStore(url, StoreOptions())


def test_a_file_system_that_is_not_mounted_is_not_filled_by_mistake(tmp_path: Path) -> None:
    store = FileStore(f"file://{tmp_path}/mount/point/kv", StoreOptions())
    assert store.exists(["a/b"], TIMEOUT) == [False]
    with pytest.raises(RemoteStoreError) as caught:
        store.put([value("a/b", b"x")], TIMEOUT)
    assert caught.value.reason == "enoent"
    assert not (tmp_path / "mount").exists()


def test_values_too_old_are_gone(tmp_path: Path) -> None:
    store = open_at(tmp_path, ttl_seconds=0.05)
    store.put([value("a/b", b"x")], TIMEOUT)
    time.sleep(0.1)
    assert store.exists(["a/b"], TIMEOUT) == [False]
    assert got(store, "a/b") == [None]


def test_what_a_dead_writer_left_is_removed_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbelow", lambda _: 0)
    store = open_at(tmp_path)
    store.put([value("a/bc1", b"x")], TIMEOUT)
    (left,) = (tmp_path / "kv/a").rglob("bc1")
    unfinished = left.with_name("bc2.host-1-ab.tmp")
    unfinished.write_bytes(b"half")
    store.put([value("a/bc1", b"y")], TIMEOUT)
    assert unfinished.exists()
    os.utime(unfinished, (0, 0))
    store.put([value("a/bc1", b"z")], TIMEOUT)
    assert not unfinished.exists()
    assert got(store, "a/bc1") == [b"z"]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_at(tmp_path)
    store.put([value("a/bc1", b"x")], TIMEOUT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(file_store, "_write", full)
        with pytest.raises(RemoteStoreError) as caught:
            store.put([value("a/bc2", b"x" * 100)], TIMEOUT)
    assert (caught.value.reason, caught.value.is_outage) == ("enospc", False)
    assert [path.name for path in (tmp_path / "kv").rglob("*") if path.is_file()] == ["bc1"]


def test_a_file_that_ends_too_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_at(tmp_path)
    store.put([value("a/bc1", b"x" * 100)], TIMEOUT)
    size = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*size(fd)[:6], 200, *size(fd)[7:])))
    with pytest.raises(RemoteStoreError, match="ended before its length"):
        got(store, "a/bc1")


def test_a_deadline_is_kept_between_two_slices(tmp_path: Path) -> None:
    store = open_at(tmp_path)
    with pytest.raises(RemoteStoreError) as caught:
        store.put([value("a/b", b"x")], timeout=-1.0)
    assert caught.value.reason == "timeout"
    assert store.exists(["a/b"], TIMEOUT) == [False]


def _write_many(tmp_path: Path, writer: int) -> None:
    store = open_at(tmp_path)
    for index in range(40):
        name = f"a/{index % 10:02d}x"
        if store.claim([name], 60.0, TIMEOUT) == [True]:
            store.put([value(name, bytes([index % 10]) * 100_000)], TIMEOUT)
            (tmp_path / f"wrote-{index % 10}-{writer}").touch()


def test_many_processes_write_each_value_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert len(list(tmp_path.glob("wrote-*"))) == 10
    store = open_at(tmp_path)
    assert got(store, *(f"a/{index:02d}x" for index in range(10))) == [bytes([i]) * 100_000 for i in range(10)]
