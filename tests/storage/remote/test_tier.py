"""``RemoteTier``, on a directory; what a store may do to it, by one that fails on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from lmcache.keys import CacheKey
from lmcache.memory.allocator import SlabAllocator
from lmcache.storage.breaker import CircuitBreaker
from lmcache.storage.chunk_header import HEADER_BYTES
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.interface import Allocate
from lmcache.storage.remote.file_store import FileStore
from lmcache.storage.remote.interface import RemoteStoreError, StoreOptions, Value, Wanted
from lmcache.storage.remote.settings import RemoteSettings
from lmcache.storage.remote.tier import RemoteTier
from lmcache.storage.tiered import TieredStorage
from tests.storage.conformance import SPEC, TierConformance, expected_bytes, fill, make_keys

A, B, C = make_keys(3)


class TroubledStore(FileStore):
    """Fails as told, and counts what it is asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(f"file://{directory}/kv", StoreOptions())
        self.failing: dict[str, Exception] = {}
        self.calls: list[str] = []
        self.written: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def _called(self, what: str) -> None:
        self.gate.wait(30)
        self.calls.append(what)
        if what in self.failing:
            raise self.failing[what]

    def exists(self, names: Sequence[str], timeout: float) -> list[bool]:
        self._called("exists")
        return super().exists(names, timeout)

    def get(self, wanted: Sequence[Wanted], timeout: float) -> None:
        if not all(name.endswith(".latest") for name, _ in wanted):
            self._called("get")
        super().get(wanted, timeout)

    def put(self, values: Sequence[Value], timeout: float) -> None:
        self._called("put")
        super().put(values, timeout)
        self.written.extend(name for name, _ in values if not name.endswith(".latest"))

    def claim(self, names: Sequence[str], seconds: float, timeout: float) -> list[bool]:
        self._called("claim")
        return super().claim(names, seconds, timeout)


class TestRemoteTier(TierConformance):
    def make_tier(self, tmp_path: Path, capacity_bytes: int, allocate: Allocate) -> RemoteTier:
        return RemoteTier(TroubledStore(tmp_path), RemoteSettings(), allocate)


class World:
    """Several servers' tiers on one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pool = SlabAllocator(8 << 20)
        self.tiers: list[RemoteTier] = []

    def server(self, **settings: float) -> tuple[RemoteTier, TroubledStore]:
        store = TroubledStore(self.directory)
        tier = RemoteTier(store, RemoteSettings(**settings), self.pool.allocate)  # type: ignore[arg-type]
        self.tiers.append(tier)
        return tier, store

    def put(self, tier: RemoteTier, key: CacheKey, *, flush: bool = True) -> bool:
        obj = self.pool.allocate(SPEC)
        assert obj is not None
        with obj:
            fill(obj, key)
            accepted = tier.submit_put(key, obj)
        assert not flush or tier.flush(30)
        return accepted


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for tier in world.tiers:
        tier.close()
    world.pool.close()


def ask(tier: RemoteTier, *keys: CacheKey) -> list[bool]:
    asked = tier.ask(keys)
    if asked is not None:
        asked.result(30)
    return [tier.contains(key) for key in keys]


def holds(tier: RemoteTier, key: CacheKey) -> bool:
    obj = tier.submit_get(key).result(30)
    if obj is None:
        return False
    with obj:
        assert torch.equal(obj.bytes, expected_bytes(key, SPEC.nbytes))
    return True


def outage(reason: str = "timeout") -> RemoteStoreError:
    return RemoteStoreError(reason, f"the store says {reason}")


def test_what_one_server_stored_another_finds_once_it_has_asked(world: World) -> None:
    (first, _), (second, _) = world.server(), world.server()
    world.put(first, A)
    assert not second.contains(A)
    assert ask(second, A, B) == [True, False]
    assert holds(second, A)


def test_what_is_known_is_not_asked_for_again(world: World) -> None:
    tier, store = world.server()
    world.put(tier, A)
    store.calls.clear()
    assert tier.ask([A]) is None
    assert store.calls == []


def test_what_was_seen_long_ago_is_asked_for_again(world: World) -> None:
    tier, store = world.server(known_seconds=0.0)
    world.put(tier, A)
    assert ask(tier, A) == [True]
    store.delete([tier.names.of(A)], 30)
    assert tier.contains(A)
    assert ask(tier, A) == [False]


def test_a_question_that_is_not_answered_in_time_is_over_all_the_same(world: World) -> None:
    tier, store = world.server()
    storage = TieredStorage(LocalCPUTier(8 << 20, "LRU"), [tier])
    store.gate.clear()
    inquiry = storage.ask([A], timeout=0.1)
    assert not inquiry.ready()
    inquiry.wait()
    assert inquiry.ready()
    store.gate.set()
    storage.close()


def test_a_chunk_that_the_store_has_lost_is_a_miss_and_no_longer_known(world: World) -> None:
    tier, store = world.server()
    world.put(tier, A)
    store.delete([tier.names.of(A)], 30)
    assert tier.contains(A)
    assert not holds(tier, A)
    assert not tier.contains(A)
    assert tier.stats().failures == {}
    assert world.put(tier, A)
    assert holds(tier, A)


def test_several_servers_write_a_chunk_once(world: World) -> None:
    servers = [world.server() for _ in range(4)]
    for tier, _ in servers:
        world.put(tier, A, flush=False)
    assert all(tier.flush(30) for tier, _ in servers)
    assert sum(len(store.written) for _, store in servers) == 1
    assert all(ask(tier, A) == [True] and holds(tier, A) for tier, _ in servers)


@pytest.mark.parametrize("offset", [0, 100, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5000, -1])
def test_a_flipped_bit_is_a_miss_and_the_chunk_is_removed(world: World, offset: int) -> None:
    tier, store = world.server()
    world.put(tier, A)
    path = store._path(tier.names.of(A))
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 4
    path.write_bytes(raw)
    assert not holds(tier, A)
    assert not path.exists()
    assert sum(tier.stats().failures.values()) == 1
    assert world.put(tier, A)
    assert holds(tier, A)


@pytest.mark.parametrize("length", [0, 10, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + SPEC.nbytes + 1])
def test_a_value_of_the_wrong_length_is_a_miss(world: World, length: int) -> None:
    tier, store = world.server()
    world.put(tier, A)
    path = store._path(tier.names.of(A))
    path.write_bytes(path.read_bytes().ljust(length, b"\0")[:length])
    assert not holds(tier, A)


def test_another_chunks_value_is_a_miss(world: World) -> None:
    tier, store = world.server()
    world.put(tier, A)
    world.put(tier, B)
    store._path(tier.names.of(A)).write_bytes(store._path(tier.names.of(B)).read_bytes())
    assert not holds(tier, A)
    assert tier.stats().failures == {"read_key": 1}
    assert holds(tier, B)


def test_no_memory_is_a_miss_and_the_chunk_stays(world: World) -> None:
    tier, _ = world.server()
    world.put(tier, A)
    tier._allocate = lambda spec: None
    assert not holds(tier, A)
    tier._allocate = world.pool.allocate
    assert ask(tier, A) == [True]
    assert holds(tier, A)


def test_a_store_that_fails_is_left_alone_then_tried_once_then_used_again(world: World) -> None:
    now = 0.0
    tier, store = world.server()
    world.put(tier, A)
    tier.breaker = CircuitBreaker(threshold=2, cooldown=10.0, clock=lambda: now)
    store.failing["exists"] = outage()
    ask(tier, B)
    assert tier.contains(A)
    ask(tier, B)
    assert not tier.contains(A)
    assert not holds(tier, A)
    assert not world.put(tier, C)
    calls = len(store.calls)
    assert tier.ask([B]) is None
    assert len(store.calls) == calls
    now = 10.5
    ask(tier, B)
    assert len(store.calls) == calls + 1
    assert tier.ask([B]) is None
    now = 31.0
    del store.failing["exists"]
    assert ask(tier, B) == [False]
    assert holds(tier, A)
    assert world.put(tier, C)
    assert holds(tier, C)


def test_a_full_store_is_not_left_alone(world: World) -> None:
    tier, store = world.server()
    world.put(tier, A)
    store.failing["put"] = RemoteStoreError("full", "no room", is_outage=False)
    for key in make_keys(10, first=10):
        world.put(tier, key)
        assert not tier.contains(key)
    assert holds(tier, A)
    assert tier.stats().dropped_puts == 10
    assert tier.stats().failures == {"write_full": 10}


@pytest.mark.parametrize("call", ["exists", "get", "put", "claim"])
@pytest.mark.parametrize("error", [outage(), ValueError("a mistake of ours")])
def test_no_failure_is_raised_and_none_leaks(world: World, call: str, error: Exception) -> None:
    tier, store = world.server()
    world.put(tier, A)
    store.failing[call] = error
    ask(tier, B)
    world.put(tier, B)
    assert holds(tier, A) == (call != "get")
    store.failing.clear()
    assert len(world.pool.live_objects()) == 0


def test_writes_that_wait_are_bounded_and_beyond_that_dropped_at_once(world: World) -> None:
    tier, store = world.server(write_queue_bytes=4 * SPEC.nbytes)
    store.gate.clear()
    accepted = [world.put(tier, key, flush=False) for key in make_keys(10, first=20)]
    assert sum(accepted) == 4
    # They are served meanwhile.
    assert all(holds(tier, key) for key, taken in zip(make_keys(10, first=20), accepted, strict=True) if taken)
    store.gate.set()
    assert tier.flush(30)
    assert tier.stats().dropped_puts == 6


def test_one_read_serves_all_who_ask_at_once(world: World) -> None:
    tier, store = world.server()
    world.put(tier, A)
    store.calls.clear()
    store.gate.clear()
    futures = [tier.submit_get(A) for _ in range(5)]
    store.gate.set()
    for future in futures:
        obj = future.result(30)
        assert obj is not None
        obj.ref_down()
    assert store.calls.count("get") == 1


def test_clear_is_for_everybody(world: World) -> None:
    (first, _), (second, _) = world.server(), world.server()
    world.put(first, A)
    assert ask(second, A) == [True]
    assert first.clear() == 1
    assert ask(first, A) == [False]
    deadline = time.monotonic() + 30
    while ask(second, B, A) != [False, False]:
        assert time.monotonic() < deadline
        second.names._refresh_at = 0.0  # half a minute later
    world.put(second, A)
    assert ask(first, A) == [True]


def test_what_a_server_writes_first_after_a_clear_is_found_by_others(world: World) -> None:
    """It was written under the name of before the clear, unless the server had looked for something first."""
    first, _ = world.server()
    first.clear()
    told = first.run_errand(lambda: None)
    assert told is not None
    told.result(30)  # behind the one that tells the store
    second, _ = world.server()
    world.put(second, A)
    assert second.contains(A)
    assert ask(first, A) == [True]
    assert holds(first, A)


def test_a_clear_that_the_store_did_not_hear_of_is_told_later(world: World) -> None:
    (first, store), (second, _) = world.server(), world.server()
    world.put(first, A)
    store.failing["put"] = outage()
    first.clear()
    assert ask(first, A) == [False]
    store.failing.clear()
    ask(first, B)
    assert ask(second, A) == [False]


def test_a_closed_tier_asks_nothing(world: World) -> None:
    tier, store = world.server()
    tier.close()
    assert tier.ask([A]) is None
    assert store.calls == []


def test_what_is_read_from_afar_goes_to_all_nearer_tiers(world: World, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    elsewhere = World(tmp_path / "elsewhere")
    (near, _), (far, _) = world.server(), elsewhere.server()
    elsewhere.put(far, A)
    memory = LocalCPUTier(8 << 20, "LRU")
    near._allocate = far._allocate = memory.allocate
    storage = TieredStorage(memory, [near, far])
    storage.ask([A, B], timeout=30).wait()
    assert storage.find([A, B]) == [far]
    found = storage.acquire(A)
    assert found is not None
    assert found.read is not None
    obj = found.read.result(30)
    assert obj is not None
    obj.ref_down()
    assert memory.contains(A)
    assert near.flush(30)
    assert near.contains(A)
    assert storage.ask([A], timeout=30).ready()
    storage.close()
    elsewhere.pool.close()
