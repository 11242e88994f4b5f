"""What an engine asks of its storage, asked of a server's."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache.keys import Namespace, SegmentKey, segment_key
from lmcache.memory.memory_obj import KVSpec
from lmcache.memory.shared_memory import SharedMemorySource
from lmcache.segmentation.known_passages import KnownChunk
from lmcache.server import protocol as p
from lmcache.server.serve import open_server
from lmcache.server.server import CacheServer
from lmcache.server.session import Session
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.tiered import TieredStorage
from tests.engine.helpers import SlowTier, kv_of, make_config, make_metadata, tokens_of
from tests.eventually import eventually
from tests.server.clients import manager_at

SPACE = Namespace(model="m", kv_dtype="float32", layout="test")
SPEC = KVSpec((2, 512), torch.float32, "test", 4)


def key(number: int) -> SegmentKey:
    return segment_key(SPACE, [number])


def put(storage, number: int, spec: KVSpec = SPEC) -> bool:
    with storage.allocate(spec) as obj:
        obj.tensor.fill_(number)
        return storage.put(key(number), obj)


@pytest.fixture
def storage(here):
    with manager_at(here.path) as manager:
        yield manager.storage


def test_nothing_is_seen_before_it_is_put(here, storage) -> None:
    with storage.allocate(SPEC) as obj:
        assert not storage.contains(key(1))
        assert storage.put(key(1), obj)
        assert storage.contains(key(1))
    assert eventually(lambda: [each.ref_count for each in here.memory.pool.live_objects()] == [1])


def test_leading_and_single_hits(storage) -> None:
    for number in (0, 1, 3):
        assert put(storage, number)
    keys = [key(number) for number in range(5)]
    assert [tier.name for tier in storage.find(keys)] == ["memory", "memory"]
    assert storage.holds(keys) == [True, True, False, True, False]
    assert storage.renew(key(3))
    assert not storage.renew(key(4))
    leading = storage.acquire_leading(keys)
    each = storage.acquire_each(keys)
    assert [found.obj.tensor.unique().tolist() for found in leading] == [[0.0], [1.0]]
    assert [found and found.obj.tensor[0, 0].item() for found in each] == [0.0, 1.0, None, 3.0, None]
    for found in [*leading, *each]:
        if found is not None:
            found.obj.ref_down()


def test_what_is_leased_or_pinned_is_not_evicted(here, storage) -> None:
    assert put(storage, 0)
    assert put(storage, 1)
    assert put(storage, 2)
    found = storage.acquire(key(0))
    assert storage.pin([key(1)]) == 1
    storage.clear()
    with found.obj as obj:
        assert obj.tensor.unique().tolist() == [0.0]
    assert storage.holds([key(1), key(2)]) == [True, False]
    storage.unpin([key(1)])
    storage.unpin([key(1)])  # without a pin nothing happens
    storage.clear()
    assert not storage.contains(key(1))


def test_one_client_cannot_undo_the_pins_of_another(here, storage) -> None:
    assert put(storage, 1)
    assert storage.pin([key(1)]) == 1
    with manager_at(here.path) as other:
        other.storage.unpin([key(1)])
        other.storage.clear()
    assert storage.contains(key(1))


def test_a_pool_that_is_full_of_leases_gives_nothing(storage) -> None:
    held = []
    while (obj := storage.allocate(KVSpec((256, 1024), torch.float32, "test", 4))) is not None:
        held.append(obj)
    assert len(held) == 8, "8 MiB"
    held.pop().ref_down()
    again = []
    assert eventually(lambda: again.append(storage.allocate(SPEC)) or again[-1] is not None)
    for obj in [*held, again[-1]]:
        obj.ref_down()


def test_objects_outlive_their_storage(here) -> None:
    with manager_at(here.path) as manager:
        assert put(manager.storage, 7)
        found = manager.storage.acquire(key(7))
    assert not manager.storage.put(key(8), found.obj)
    assert found.obj.tensor.unique().tolist() == [7.0]
    assert here.clients == 1, "the server holds it as long"
    found.obj.ref_down()
    assert eventually(lambda: here.clients == 0)


def test_many_threads_share_a_connection(storage) -> None:
    wrong: list[object] = []

    def work(first: int) -> None:
        for number in range(first, first + 30):
            try:
                assert put(storage, number)
                with storage.acquire(key(number)).obj as obj:
                    assert obj.tensor.unique().tolist() == [float(number)]
            except Exception as error:  # noqa: PERF203
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_passages_are_known_to_all_engines_and_the_next_run(tmp_path) -> None:
    config = make_config(local_disk=tmp_path / "disk", max_local_disk_size=1.0)
    tokens = np.arange(64, dtype=np.uint32)
    layout = make_metadata().namespace("test")
    name = segment_key(layout, tokens)

    def knows(manager) -> bool:
        return bool(manager.passages.find(tokens, layout.id, 32))

    server = open_server(config, tmp_path / "a.sock")
    blending = {"enable_blending": True, "chunk_size": 64, "blend_min_tokens": 32}
    metadata = make_metadata(kv_shape=(3, 2, 64, 2, 8))

    def attached():
        from lmcache.manager import LMCacheManager

        return LMCacheManager(make_config(server_socket=tmp_path / "a.sock", **blending), metadata)

    with attached() as first, attached() as second:
        with first.storage.allocate(SPEC) as obj:
            assert first.storage.put(name, obj)
        first.passages.add_prompt([KnownChunk(name, tokens, 0)])
        assert knows(first)
        assert eventually(lambda: knows(second))
        with attached() as third:
            assert third.passages.loaded.wait(10)
            assert knows(third)
        server.storage.flush(10)
        server.close()
        assert not knows(first), "a server that is gone holds nothing"
        server = open_server(config, tmp_path / "a.sock")
        assert eventually(lambda: knows(first) and knows(second))
        server.close()


def forget(tier: LocalCPUTier) -> None:
    """Also what a client has not given back yet."""
    for each in tier.keys():  # noqa: SIM118 - not a mapping
        assert tier.remove(each)


@pytest.fixture
def slow_server(tmp_path):
    memory = LocalCPUTier(8 << 20, shared=SharedMemorySource(), pin_memory=False)
    slow = SlowTier(memory.allocate)
    server = CacheServer(tmp_path / "slow.sock", memory, TieredStorage(memory, [slow]))
    yield server, slow
    server.close()


def test_reads_arrive_later(slow_server) -> None:
    server, slow = slow_server
    tokens = tokens_of(64)
    with manager_at(server.path) as manager:
        engine = manager.engine
        engine.store(tokens, kv_of(tokens))
        forget(server.memory)
        assert engine.lookup(tokens) == 64
        with engine.prefetch(tokens) as lease:
            assert lease.num_tokens == 64
            assert not lease.ready()
            slow.answer_all()
            assert lease.wait(10)
            blob, found = engine.retrieve(tokens, return_tuple=False, lease=lease)
            assert bool(found.all())
            assert torch.equal(blob, kv_of(tokens))
            assert lease.tokens_by_tier() == {"slow": 64}


def test_a_client_that_leaves_before_its_reads_arrive_leaves_nothing(slow_server) -> None:
    server, slow = slow_server
    tokens = tokens_of(64)
    with manager_at(server.path) as manager:
        manager.engine.store(tokens, kv_of(tokens))
        forget(server.memory)
        lease = manager.engine.prefetch(tokens)
    assert lease.ready(), "whatever has not arrived is a miss"
    assert lease.num_tokens == 0
    assert eventually(lambda: server.clients == 0)
    slow.answer_all()


def test_a_read_that_ends_before_its_call_fails_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was held until the client left: nobody had asked for its future."""
    acquire = Session._acquire

    def refuse(self: Session, call: p.Acquire) -> p.Reply:
        acquire(self, call)
        time.sleep(0.3)  # meanwhile the client is told that the read has ended
        raise ValueError("injected")

    monkeypatch.setattr(Session, "_acquire", refuse)
    server = open_server(make_config(local_disk=tmp_path / "disk", local_cpu=False), tmp_path / "kv.sock")
    with manager_at(server.path) as manager:
        assert put(manager.storage, 1)
        assert manager.storage.flush(10)
        assert eventually(lambda: server.memory.pool.used_bytes == 0)
        assert manager.storage.acquire_each([key(1)]) == [None]
        assert eventually(lambda: server.memory.pool.used_bytes == 0)
    server.close()


def test_a_read_may_end_before_its_call_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = Session._acquire

    def late(self: Session, call: p.Acquire) -> p.Reply:
        reply = acquire(self, call)
        time.sleep(0.3)
        return reply

    monkeypatch.setattr(Session, "_acquire", late)
    server = open_server(make_config(local_disk=tmp_path / "disk", local_cpu=False), tmp_path / "kv.sock")
    with manager_at(server.path) as manager:
        assert put(manager.storage, 1)
        assert manager.storage.flush(10)
        (found,) = manager.storage.acquire_leading([key(1)])
        with found.read.result(10) as obj:
            assert obj.spec == SPEC
        assert eventually(lambda: server.memory.pool.used_bytes == 0)
    server.close()
