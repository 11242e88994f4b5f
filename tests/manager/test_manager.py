"""Everything is built and taken down in order, whatever happens."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from lmcache.manager import LMCacheManager
from lmcache.storage.disk import LocalDiskTier
from tests.engine.helpers import CHUNK, kv_of, make_config, make_metadata, tokens_of


def disk_config(directory: Path, **overrides):
    return make_config(**{"local_disk": directory, "max_local_disk_size": 64 / 1024, **overrides})


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """No thread and no open file outlives its manager."""

    def open_files():
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return {os.readlink(link) for link in links if os.path.lexists(link)}

    threads, files = set(threading.enumerate()), open_files()
    yield
    assert set(threading.enumerate()) <= threads
    assert {name for name in open_files() - files if name.startswith("/")} == set()


def test_a_restart_finds_what_was_stored(tmp_path):
    tokens = tokens_of(3 * CHUNK)
    with LMCacheManager(disk_config(tmp_path), make_metadata()) as manager:
        assert manager.engine.store(tokens, kv_of(tokens)) == 3 * CHUNK
    with LMCacheManager(disk_config(tmp_path), make_metadata()) as manager:
        assert manager.engine.lookup(tokens) == 3 * CHUNK
        with manager.engine.prefetch(tokens) as lease:
            assert lease.wait(60)
            assert lease.tokens_by_tier() == {"disk": 3 * CHUNK}
        blob, _ = manager.engine.retrieve(tokens, return_tuple=False)
        assert torch.equal(blob, kv_of(tokens))
        stats = manager.stats()
        assert list(stats.tiers) == ["memory", "disk"]
        assert stats.reused_tokens["memory"] == 3 * CHUNK, "what the lease read was in memory by then"


def test_without_local_cpu_memory_is_staging_only(tmp_path):
    tokens = tokens_of(2 * CHUNK)
    with LMCacheManager(disk_config(tmp_path, local_cpu=False), make_metadata()) as manager:
        assert manager.engine.store(tokens, kv_of(tokens)) == 2 * CHUNK
        assert manager.storage.flush(60)
        assert manager.storage.memory.pool.used_bytes == 0
        blob, _ = manager.engine.retrieve(tokens, return_tuple=False)
        assert torch.equal(blob, kv_of(tokens))
        assert manager.stats().reused_tokens == {"memory": 0, "disk": 2 * CHUNK}


def test_a_disk_that_cannot_be_used_is_said_and_done_without(tmp_path, caplog):
    occupied = tmp_path / "file"
    occupied.write_text("not a directory")
    tokens = tokens_of(CHUNK)
    with (
        caplog.at_level(logging.ERROR, logger="lmcache"),
        LMCacheManager(disk_config(occupied), make_metadata()) as manager,
    ):
        assert manager.engine.store(tokens, kv_of(tokens)) == CHUNK
        assert manager.engine.contains(tokens)
        assert list(manager.stats().tiers) == ["memory"]
        assert manager.metrics.snapshot()['lmcache_failures_total{reason="disk_start"}'] == 1
    (record,) = caplog.records
    assert str(occupied) in record.message


def test_two_managers_on_one_directory(tmp_path, caplog):
    """Two servers: the second goes on without the disk."""
    with (
        LMCacheManager(disk_config(tmp_path), make_metadata()) as first,
        LMCacheManager(disk_config(tmp_path), make_metadata()) as second,
    ):
        assert "disk" in first.stats().tiers
        assert "disk" not in second.stats().tiers
    with LMCacheManager(disk_config(tmp_path), make_metadata()) as third:
        assert "disk" in third.stats().tiers


def test_a_failed_start_leaves_nothing(tmp_path, monkeypatch):
    """The engine refuses last, when memory and disk are up."""
    with pytest.raises(ValueError, match="chunk_size"):
        LMCacheManager(disk_config(tmp_path, chunk_size=32), make_metadata())

    def fail(*_, **__):
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(LocalDiskTier, "__init__", fail)
        with pytest.raises(MemoryError):
            LMCacheManager(disk_config(tmp_path), make_metadata())
    with LMCacheManager(disk_config(tmp_path), make_metadata()) as manager:
        assert "disk" in manager.stats().tiers, "the directory's lock was given back"


def test_closing_twice_and_a_lease_that_is_released_late(tmp_path):
    manager = LMCacheManager(disk_config(tmp_path), make_metadata())
    tokens = tokens_of(2 * CHUNK)
    manager.engine.store(tokens, kv_of(tokens))
    lease = manager.engine.prefetch(tokens)
    manager.close()
    manager.close()
    assert torch.equal(manager.engine.retrieve(tokens, return_tuple=False, lease=lease)[0], kv_of(tokens))
    lease.release()
    assert manager.storage.memory.pool.used_bytes == 0


def test_closing_while_stores_are_under_way(tmp_path):
    """A server that shuts down does not wait for its last requests."""
    manager = LMCacheManager(disk_config(tmp_path, max_local_cpu_size=160 / 1024 / 1024), make_metadata())
    stop = threading.Event()

    def store():
        seed = 0
        while not stop.is_set():
            tokens = tokens_of(2 * CHUNK, seed := seed + 1)
            manager.engine.store(tokens, kv_of(tokens))
            manager.engine.retrieve(tokens)

    threads = [threading.Thread(target=store) for _ in range(3)]
    for thread in threads:
        thread.start()
    stop.wait(0.2)
    manager.close()
    stop.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
