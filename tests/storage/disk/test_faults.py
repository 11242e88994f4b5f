"""Whatever the medium does is a miss, counted and logged once; serving goes on."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.breaker import CircuitBreaker
from lmcache.storage.disk import DiskTierError, LocalDiskTier, chunk_directory, chunk_file
from lmcache.storage.disk.chunk_directory import ChunkDirectory
from lmcache.storage.disk.index import DiskIndex
from tests.storage.disk.helpers import SPEC, Heap, chunk_files, content, get, key_of, open_tier, put, spec_of

A, B, C = key_of(1), key_of(2), key_of(3)


@pytest.fixture
def tier(tmp_path: Path, heap: Heap) -> Iterator[LocalDiskTier]:
    tier = open_tier(tmp_path / "kv", heap)
    assert put(tier, heap, A)
    assert tier.flush(30)
    yield tier
    tier.close()


@pytest.fixture
def file(tier: LocalDiskTier, tmp_path: Path) -> Path:
    """Of ``A``."""
    (file,) = chunk_files(tmp_path / "kv")
    return file


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def assert_still_serves(tier: LocalDiskTier, heap: Heap) -> None:
    assert put(tier, heap, C)
    assert tier.flush(30)
    assert get(tier, C) == content(C, SPEC.nbytes)


# Reading


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[6000] ^= 1
    file.write_bytes(raw)


def swap(file: Path) -> None:
    heap = Heap()
    file.unlink()
    with heap.filled(B) as obj:
        chunk_file.write_chunk(file, B, obj, direct=False, fsync=False)


def change_dtype(file: Path) -> None:
    heap = Heap()
    file.unlink()
    with heap.filled(A, KVSpec(SPEC.shape, torch.int8, SPEC.layout, SPEC.num_tokens)) as obj:
        chunk_file.write_chunk(file, A, obj, direct=False, fsync=False)


def become_a_symlink(file: Path) -> None:
    file.rename(file.with_suffix(".real"))
    file.symlink_to(file.with_suffix(".real"))


DAMAGES = {
    "read_enoent": lambda file: file.unlink(),
    "read_size": lambda file: os.truncate(file, 5000),
    "read_magic": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "read_checksum": flip,
    "read_key": swap,
    "read_spec": change_dtype,
    "read_eloop": become_a_symlink,
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_file_that_is_no_good_is_a_miss_and_goes(tier: LocalDiskTier, file: Path, heap: Heap, reason: str) -> None:
    DAMAGES[reason](file)
    assert tier.contains(A)
    assert get(tier, A) is None
    assert not tier.contains(A)
    assert tier.stats().failures == {reason: 1}
    assert tier.stats().used_bytes == 0
    assert tier.flush(30)
    assert not os.path.lexists(file)
    assert put(tier, heap, A)
    assert tier.flush(30)
    assert get(tier, A) == content(A, SPEC.nbytes)


def test_a_read_error_is_a_miss(
    tier: LocalDiskTier, heap: Heap, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(chunk_file, "read_all", raising(OSError(errno.EIO, "Input/output error")))
        assert get(tier, A) is None
    assert not tier.contains(A)
    assert tier.stats().failures == {"read_eio": 1}
    assert_still_serves(tier, heap)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.EACCES, "denied")])
def test_a_shortage_that_passes_costs_a_miss_and_not_the_entry(
    tier: LocalDiskTier, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(chunk_file, "read_all", raising(error))
        assert get(tier, A) is None
    assert get(tier, A) == content(A, SPEC.nbytes)


def test_no_host_memory_costs_a_miss_and_not_the_entry(tmp_path: Path, heap: Heap) -> None:
    tier = open_tier(tmp_path, heap)
    assert put(tier, heap, A)
    tier.close()
    starved = open_tier(tmp_path, heap)
    for allocate, reason in ((lambda spec: None, "read_no_memory"), (raising(RuntimeError("boom")), "read_internal")):
        starved._allocate = allocate
        assert get(starved, A) is None
        assert starved.contains(A)
        assert starved.stats().failures[reason] == 1
    starved.close()


def test_many_failures_are_logged_once(tmp_path: Path, heap: Heap, caplog: pytest.LogCaptureFixture) -> None:
    tier = open_tier(tmp_path, heap)
    keys = [key_of(i) for i in range(20)]
    for key in keys:
        put(tier, heap, key)
    assert tier.flush(30)
    for file in chunk_files(tmp_path):
        file.write_bytes(b"LMCCHUNK" + bytes(file.stat().st_size - 8))  # of format version 0
    with caplog.at_level(logging.WARNING):
        assert all(get(tier, key) is None for key in keys)
    assert len([r for r in caplog.records if "format version 0" in r.getMessage()]) <= 1
    assert tier.stats().failures == {"read_version": 20}
    tier.close()


def test_everyone_who_waits_for_the_same_chunk_gets_it(tier: LocalDiskTier) -> None:
    futures = [tier.submit_get(A) for _ in range(50)]
    assert not any(future.cancel() for future in futures)
    for future in futures:
        obj = future.result(timeout=30)
        assert obj is not None
        with obj:
            assert obj.bytes.numpy().tobytes() == content(A, SPEC.nbytes)
    assert tier.stats().hits == 50


# Writing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_write_error_drops_the_chunk(
    tier: LocalDiskTier, heap: Heap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(chunk_file, "write_all", raising(OSError(number, os.strerror(number))))
        assert put(tier, heap, B)
        assert tier.flush(30)
    assert not tier.contains(B)
    assert get(tier, B) is None
    stats = tier.stats()
    assert stats.failures == {f"write_{errno.errorcode[number].lower()}": 1}
    assert stats.dropped_puts == 1
    assert len(chunk_files(tmp_path / "kv")) == 1
    assert list((tmp_path / "kv" / "tmp").iterdir()) == []
    assert_still_serves(tier, heap)


def test_after_several_write_errors_it_stops_trying(
    tier: LocalDiskTier, heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fail(*args: object) -> None:
        tries.append(args)
        raise OSError(errno.EIO, "Input/output error")

    now = 0.0
    tier._writer.breaker = CircuitBreaker(threshold=3, cooldown=10.0, clock=lambda: now)
    with monkeypatch.context() as broken:
        broken.setattr(chunk_file, "write_all", fail)
        for number in range(10, 20):
            put(tier, heap, key_of(number))
            assert tier.flush(30)
    assert len(tries) == 3
    assert tier.stats().dropped_puts == 10
    assert get(tier, A) == content(A, SPEC.nbytes)
    assert not put(tier, heap, C)
    now = 10.0
    assert_still_serves(tier, heap)


def test_the_breaker_waits_longer_each_time_up_to_its_maximum() -> None:
    now = 0.0
    breaker = CircuitBreaker(threshold=2, cooldown=1.0, max_cooldown=4.0, clock=lambda: now)
    breaker.failed()
    assert breaker.allows()
    for pause in (1, 2, 4, 4):
        breaker.failed()
        now += pause - 0.5
        assert not breaker.allows()
        now += 0.5
        assert breaker.allows()
    breaker.succeeded()
    breaker.failed()
    assert breaker.allows()


@pytest.mark.parametrize("phase", ["begun", "finished"])
def test_an_index_that_cannot_be_written_drops_the_chunk(
    tier: LocalDiskTier, heap: Heap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    commit = DiskIndex.commit

    def fail(self: DiskIndex, **rows: Any) -> None:
        if rows[phase]:
            raise sqlite3.OperationalError("database or disk is full")
        commit(self, **rows)

    with monkeypatch.context() as broken:
        broken.setattr(DiskIndex, "commit", fail)
        assert put(tier, heap, B)
        assert tier.flush(30)
    assert not tier.contains(B)
    assert tier.stats().failures == {"index": 1}
    assert len(chunk_files(tmp_path / "kv")) == 1
    assert_still_serves(tier, heap)


def test_a_file_that_cannot_be_removed_counts_on(
    tier: LocalDiskTier, heap: Heap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tier.stats().used_bytes
    with monkeypatch.context() as broken:
        broken.setattr(ChunkDirectory, "unlink", raising(OSError(errno.EROFS, "Read-only file system")))
        assert tier.remove(A)
        assert tier.flush(30)
    assert not tier.contains(A)
    assert tier.stats().used_bytes == used
    assert tier.stats().failures == {"unlink_erofs": 1}
    tier.close()
    again = open_tier(tmp_path / "kv", heap)
    assert get(again, A) == content(A, SPEC.nbytes)
    again.close()


def test_a_directory_that_vanishes(tier: LocalDiskTier, heap: Heap, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "kv")
    assert get(tier, A) is None
    for number in range(5):
        put(tier, heap, key_of(number))
        assert tier.flush(30)
        assert get(tier, key_of(number)) is None
    assert not (tmp_path / "kv").exists()
    tier.close()


def test_closing_drops_what_a_slow_disk_has_not_taken(
    tmp_path: Path, heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path, heap, close_timeout=0.0)
    for number in range(30):
        assert put(tier, heap, key_of(number), spec_of(500_000))
    tier.close()
    assert not put(tier, heap, A)
    assert heap.live == 0


# The directory itself


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, heap: Heap) -> None:
    tier = open_tier(small_disk / "kv", heap, 1 << 30)
    keys = [key_of(number) for number in range(50)]
    for key in keys:
        put(tier, heap, key, spec_of(1 << 20))
        assert tier.flush(30)
    stats = tier.stats()
    assert stats.failures["write_enospc"] >= 1
    assert 15 <= stats.entries < 24
    held = [key for key in keys if tier.contains(key)]
    assert all(get(tier, key) == content(key, 1 << 20) for key in held)
    for key in held[:10]:
        assert tier.remove(key)
    assert tier.flush(30)
    tier.close()
    again = open_tier(small_disk / "kv", heap, 1 << 30)
    assert all(get(again, key) == content(key, 1 << 20) for key in held[10:])
    assert_still_serves(again, heap)
    again.close()


def test_a_disk_that_really_becomes_read_only(small_disk: Path, heap: Heap) -> None:
    tier = open_tier(small_disk / "kv", heap)
    assert put(tier, heap, A)
    assert tier.flush(30)
    tier.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DiskTierError, match=r"cannot be used: .*Read-only.*may write"):
        open_tier(small_disk / "kv", heap)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    again = open_tier(small_disk / "kv", heap)
    assert get(again, A) == content(A, SPEC.nbytes)
    again.close()


def test_a_limit_on_the_size_of_files_is_a_write_error_like_any(tier: LocalDiskTier, heap: Heap) -> None:
    """A real one, from the kernel, in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
    try:
        assert put(tier, heap, B, spec_of(6 << 20))
        assert tier.flush(30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not tier.contains(B)
    assert tier.stats().failures == {"write_efbig": 1}
    assert_still_serves(tier, heap)


def test_a_path_that_is_no_directory_is_refused_with_words(tmp_path: Path, heap: Heap) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DiskTierError, match=f"local_disk {path} cannot be used"):
            open_tier(path, heap)


def test_a_directory_without_permission_is_refused_with_words(tmp_path: Path, heap: Heap) -> None:
    tmp_path.chmod(0o500)
    child = os.fork()
    if child == 0:
        # Permissions do not bind root.
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            open_tier(tmp_path / "kv", heap)
        except DiskTierError as error:
            os._exit(0 if "Permission denied" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_a_failed_start_leaves_the_lock_free(tmp_path: Path, heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(chunk_directory, "supports_direct_io", raising(PermissionError(errno.EACCES, "denied")))
        with pytest.raises(DiskTierError, match="denied"):
            open_tier(tmp_path, heap)
    open_tier(tmp_path, heap).close()


def test_without_o_direct_everything_is_buffered(tmp_path: Path, heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_directory, "supports_direct_io", lambda directory: False)
    tier = open_tier(tmp_path, heap, fsync=True)
    assert_still_serves(tier, heap)
    tier.close()
