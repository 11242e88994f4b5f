"""Engines and server in processes of their own, some of which are killed."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from demo.fleet.standstill import go_on, stand_still
from tests.engine.helpers import kv_of, tokens_of
from tests.eventually import eventually
from tests.memory.huge_pages import need_huge_pages, page_sizes_of_slabs
from tests.server.clients import manager_at
from tests.server.processes import ClientProcess, ServerProcess


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "kv.sock") as server:
        yield server


def assert_exact(engine, tokens, kv=None) -> None:
    blob, found = engine.retrieve(tokens, return_tuple=False)
    assert bool(found.all())
    assert torch.equal(blob, kv_of(tokens) if kv is None else kv)


def test_what_one_process_stores_another_finds_exactly(server: ServerProcess) -> None:
    with ClientProcess("store", server.socket, 160, 1) as other:
        assert other.says() == "160"
        assert other.process.wait(20) == 0
    tokens = tokens_of(160, 1)
    with manager_at(server.socket) as manager:
        assert manager.engine.lookup(tokens) == 160
        assert_exact(manager.engine, tokens)
        assert manager.engine.store(tokens, kv_of(tokens)) == 0, "it is there already"
        assert manager.stats().reused_tokens == {"memory": 160}
    assert "Traceback" not in server.stop()


@pytest.mark.parametrize(("huge_pages", "page_size"), [("true", 2 << 20), ("false", 4096)])
def test_memory_of_huge_pages_is_read_and_written_alike(tmp_path: Path, huge_pages: str, page_size: int) -> None:
    need_huge_pages(4)
    with (
        ServerProcess(tmp_path / "kv.sock", max_local_cpu_size=8 / 1024, server_huge_pages=huge_pages) as server,
        manager_at(server.socket) as manager,
    ):
        tokens = tokens_of(160, 1)
        assert manager.engine.store(tokens, kv_of(tokens)) == 160
        assert_exact(manager.engine, tokens)
        assert page_sizes_of_slabs() == {page_size}
        with ClientProcess("store", server.socket, 96, 2) as other:
            assert other.says() == "96"
        assert_exact(manager.engine, tokens_of(96, 2))


def test_a_client_that_is_killed_gives_everything_back(server: ServerProcess) -> None:
    with manager_at(server.socket) as manager:
        engine = manager.engine
        mine = tokens_of(64, 9)
        engine.store(mine, kv_of(mine))
        with ClientProcess("hold", server.socket, 1) as other:
            assert other.says() == "holding"
            time.sleep(1.1)  # counts are a second old at most
            used = engine.stats().tiers["memory"].used_bytes
            assert engine.clear() > 0
            assert engine.lookup(tokens_of(64, 1)) == 64, "the other has pinned it"
            other.kill()

        def all_free() -> bool:
            engine.clear()
            time.sleep(0.3)
            return engine.stats().tiers["memory"].used_bytes == 0

        assert used > 0
        assert eventually(all_free)
        assert engine.lookup(tokens_of(64, 2)) == 0, "what was half stored was never seen"
        engine.store(mine, kv_of(mine))
        assert_exact(engine, mine)


def test_a_killed_server_is_a_miss_and_comes_back(tmp_path: Path) -> None:
    socket = tmp_path / "kv.sock"
    tokens, half_stored, other = (tokens_of(64, seed) for seed in range(3))
    with ServerProcess(socket) as server, manager_at(socket) as manager:
        engine = manager.engine
        engine.store(tokens, kv_of(tokens))
        lease = engine.prefetch(tokens)
        layers = engine.store_layer(half_stored)
        next(layers)
        server.kill()
        assert engine.lookup(tokens) == 0
        assert engine.store(other, kv_of(other)) == 0
        assert engine.prefetch(other).num_tokens == 0
        blob, found = engine.retrieve(tokens, return_tuple=False, lease=lease)
        assert bool(found.all())
        assert torch.equal(blob, kv_of(tokens)), "what is held stays as it was"
        with ServerProcess(socket):
            assert eventually(lambda: engine.store(other, kv_of(other)) == 64)
            for layer in kv_of(half_stored):
                layers.send(tuple(layer.unbind(0)))
            assert engine.lookup(half_stored) == 0
            assert engine.lookup(tokens) == 0, "of the old server nothing is left"
            assert_exact(engine, other)
            lease.release()
            engine.store(tokens, kv_of(tokens))
            assert_exact(engine, tokens)
            assert manager.metrics.snapshot()['lmcache_failures_total{reason="server_lost"}'] == 1


def test_a_server_that_comes_later_is_found(tmp_path: Path) -> None:
    tokens = tokens_of(64)
    with manager_at(tmp_path / "kv.sock") as manager:
        assert manager.engine.store(tokens, kv_of(tokens)) == 0
        assert manager.stats().tiers == {}
        with ServerProcess(tmp_path / "kv.sock"):
            assert eventually(lambda: manager.engine.store(tokens, kv_of(tokens)) == 64)
            assert_exact(manager.engine, tokens)


def test_a_server_that_stands_still_costs_one_deadline(server: ServerProcess) -> None:
    tokens = tokens_of(64)
    with manager_at(server.socket, server_timeout_seconds=0.3) as manager:
        engine = manager.engine
        engine.store(tokens, kv_of(tokens))
        with engine.prefetch(tokens) as lease:
            stand_still(server.process.pid)
            assert engine.lookup(tokens) == 0
            assert manager.storage.client.attachment is None, "nothing more is asked there"
            go_on(server.process.pid)
            assert eventually(lambda: engine.lookup(tokens) == 64)
            engine.clear()
            filler = tokens_of(4096, 5)
            engine.store(filler, kv_of(filler))
            blob, _ = engine.retrieve(tokens, return_tuple=False, lease=lease)
            assert torch.equal(blob, kv_of(tokens)), "memory that is held is not given to others"


def test_the_disk_outlives_the_server(tmp_path: Path) -> None:
    socket, tokens = tmp_path / "kv.sock", tokens_of(160)
    for run in range(2):
        with ServerProcess(socket, local_disk=tmp_path / "disk") as server, manager_at(socket) as manager:
            if run == 0:
                assert manager.engine.store(tokens, kv_of(tokens)) == 160
            else:
                assert manager.engine.lookup(tokens) == 160
                assert_exact(manager.engine, tokens)
                assert manager.stats().reused_tokens["disk"] == 160
            assert "Traceback" not in server.stop()


def test_a_signal_that_another_thread_catches_ends_the_server(server: ServerProcess) -> None:
    """Python's main thread then sleeps on: on a busy machine a server that was told to end stayed for ever."""
    pid = server.process.pid
    other = max(map(int, os.listdir(f"/proc/{pid}/task")))  # it waits for clients
    assert other != pid
    assert ctypes.CDLL(None).tgkill(pid, other, signal.SIGTERM) == 0
    assert server.process.wait(20) == 0


def test_a_pool_too_small_for_all_evicts_and_never_mixes(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path / "kv.sock", max_local_cpu_size=1 / 1024) as server,
        manager_at(server.socket) as first,
        manager_at(server.socket) as second,
    ):
        for seed in range(60):
            engine = (first, second)[seed % 2].engine
            tokens = tokens_of(96, seed)
            assert engine.store(tokens, kv_of(tokens)) == 96
            for earlier in range(max(0, seed - 3), seed + 1):
                known = tokens_of(96, earlier)
                blob, found = first.engine.retrieve(known, return_tuple=False)
                if count := int(found.sum()):
                    assert torch.equal(blob, kv_of(known)[:, :, :count])
        assert engine.stats().tiers["memory"].evictions > 0 or eventually(
            lambda: engine.stats().tiers["memory"].evictions > 0
        )
