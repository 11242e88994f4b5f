"""One store, engines with other numbers of tensor-parallel ranks: chunks against plain slices of the whole model's."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.fleet.redis_server import RedisServer
from lmcache.keys import CacheKey, Shard
from lmcache.memory.memory_obj import KVSpec
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.remote.interface import RemoteStore, RemoteStoreError, StoreOptions
from lmcache.storage.remote.other_sizes import OtherSizes
from lmcache.storage.remote.settings import RemoteSettings
from lmcache.storage.remote.stores import open_store
from lmcache.storage.remote.tier import RemoteTier
from lmcache.storage.resharded import ReshardedTier, ShardSource
from lmcache.storage.tiered import TieredStorage
from tests.storage.remote.test_tier import TroubledStore
from tests.storage.test_resharded import HEADS, SIZES, all_shards, key_of, namespace, part

A, B = 1, 2


class Rank:
    """One rank's tiers."""

    def __init__(self, store: RemoteStore, shard: Shard) -> None:
        self.shard = shard
        self.memory = LocalCPUTier(4 << 20, slab_bytes=1 << 20, pin_memory=False)
        sizes = OtherSizes(namespace(shard), HEADS)
        self.remote = RemoteTier(store, RemoteSettings(), self.memory.allocate, other_sizes=sizes)
        sources = [ShardSource(other, self.remote) for other in sizes.shards]
        self.resharded = ReshardedTier(shard, [], self.memory.allocate, shared=sources)
        self.storage = TieredStorage(self.memory, [self.remote], sources=[self.resharded])

    def put(self, number: int, *, layout: str = TOKEN_MAJOR) -> None:
        tensor = part(number, self.shard)
        obj = self.storage.allocate(KVSpec(tuple(tensor.shape), tensor.dtype, layout, tensor.shape[2]))
        assert obj is not None
        with obj:
            obj.tensor.copy_(tensor)
            assert self.storage.put(key_of(number, self.shard), obj)
        assert self.storage.flush(30)

    def finds(self, *numbers: int) -> list[str]:
        """The tiers of the leading hits."""
        keys = [key_of(number, self.shard) for number in numbers]
        self.storage.ask(keys, 30).wait()
        return [tier.name for tier in self.storage.find(keys)]

    def gets(self, number: int) -> bool:
        """Whether it comes, and then it is right."""
        found = self.storage.acquire(key_of(number, self.shard))
        if found is None:
            return False
        obj = found.obj if found.read is None else found.read.result(30)
        if obj is None:
            return False
        with obj:
            assert torch.equal(obj.tensor, part(number, self.shard))
        return True


class Fleet:
    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack

    def rank(self, shard: Shard) -> tuple[Rank, TroubledStore]:
        store = TroubledStore(self.directory)
        rank = Rank(store, shard)
        self._stack.callback(rank.storage.close)
        return rank, store

    def put(self, number: int, shards: Sequence[Shard], *, layout: str = TOKEN_MAJOR) -> None:
        for shard in shards:
            self.rank(shard)[0].put(number, layout=layout)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path, stack)


def value_of(rank: Rank, store: TroubledStore, key: CacheKey) -> Path:
    return store._path(rank.remote.names.of(key))


@given(own=st.sampled_from(all_shards(SIZES)), kept=st.sampled_from(SIZES), data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_chunk_is_there_exactly_when_all_its_parts_are_and_right_when_they_are_sound(
    own: Shard, kept: int, data: st.DataObject
) -> None:
    shards = all_shards([kept])
    states = data.draw(st.lists(st.sampled_from(["sound"] * 4 + ["missing", "damaged"]), min_size=kept, max_size=kept))
    needed = {
        shard: state
        for shard, state in zip(shards, states, strict=True)
        if shard.tp_rank * own.tp_size < (own.tp_rank + 1) * kept
        and (shard.tp_rank + 1) * own.tp_size > own.tp_rank * kept
    }
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        fleet = Fleet(Path(directory), stack)
        fleet.put(B, shards)
        fleet.put(A, [shard for shard, state in zip(shards, states, strict=True) if state != "missing"])
        rank, store = fleet.rank(own)
        for shard, state in zip(shards, states, strict=True):
            if state == "damaged":
                path = value_of(rank, store, key_of(A, shard))
                raw = bytearray(path.read_bytes())
                raw[-1] ^= 0xFF
                path.write_bytes(raw)
        assert bool(rank.finds(A)) == ("missing" not in needed.values())
        assert rank.gets(A) == (set(needed.values()) == {"sound"})
        if set(needed.values()) != {"sound"}:
            assert not rank.finds(A), "what is damaged was removed"
            assert not rank.gets(A)
        assert rank.finds(B)
        assert rank.gets(B)


OTHER_SIZES = pytest.mark.parametrize(("kept", "wanted"), [(2, 1), (1, 2)])
"""Numbers of ranks that write, and that read."""


def check_that_others_find_it(open_one: Callable[[], RemoteStore], kept: int, wanted: int, *, number: int = A) -> None:
    """``open_one``: a rank's own way to one store, in which nobody has the chunk ``number``."""
    with ExitStack() as stack:

        def rank_of(shard: Shard) -> Rank:
            rank = Rank(open_one(), shard)
            stack.callback(rank.storage.close)
            return rank

        for shard in all_shards([kept]):
            rank_of(shard).put(number)
        for shard in all_shards([wanted]):
            rank = rank_of(shard)
            assert rank.finds(number, B) == ["resharded"]
            assert rank.gets(number)
            assert rank.finds(number, B) == ["memory"]


@OTHER_SIZES
def test_redis(tmp_path: Path, kept: int, wanted: int) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("apt-get install redis-server")
    with RedisServer(tmp_path) as server:
        check_that_others_find_it(lambda: open_store(server.url, StoreOptions()), kept, wanted)


def test_one_question_for_all_names_and_none_for_what_is_known(fleet: Fleet) -> None:
    fleet.put(A, all_shards([2]))
    rank, store = fleet.rank(Shard(0, 1))
    assert rank.finds(A, B) == ["resharded"]
    assert store.calls == ["exists"]
    assert rank.finds(A) == ["resharded"]
    assert store.calls == ["exists"]


def test_only_sizes_that_have_written_are_asked_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.put(A, all_shards([2]))
    rank, store = fleet.rank(Shard(0, 1))
    asked: list[str] = []
    exists = store.exists

    def listening(names: Sequence[str], timeout: float) -> list[bool]:
        asked.extend(names)
        return exists(names, timeout)

    monkeypatch.setattr(store, "exists", listening)
    rank.finds(B)
    names = rank.remote.names
    assert asked == [names.of(key_of(B, shard)) for shard in (Shard(0, 1), Shard(0, 2), Shard(1, 2))]


def test_a_size_that_begins_to_write_is_noticed_with_the_next_refresh(fleet: Fleet) -> None:
    rank, _ = fleet.rank(Shard(0, 1))
    assert rank.finds(A) == []
    fleet.put(A, all_shards([2]))
    assert rank.finds(A) == []
    rank.remote.names._refresh_at = 0.0  # half a minute later
    assert rank.finds(A) == ["resharded"]


def test_a_mark_that_was_evicted_is_left_again(fleet: Fleet) -> None:
    writer, store = fleet.rank(Shard(0, 2))
    fleet.put(A, [Shard(1, 2)])
    writer.put(A)
    store.delete(OtherSizes(namespace(Shard(0, 2)), HEADS).marks[:1], 30)
    assert fleet.rank(Shard(0, 1))[0].finds(A) == []
    writer.remote.names._refresh_at = 0.0
    writer.put(B)
    assert fleet.rank(Shard(0, 1))[0].finds(A) == ["resharded"]


def test_what_the_store_has_in_parts_is_not_written_to_it_again(fleet: Fleet) -> None:
    fleet.put(A, all_shards([2]))
    rank, store = fleet.rank(Shard(0, 1))
    rank.finds(A)
    assert rank.gets(A)
    assert rank.storage.flush(30)
    assert store.written == []


def test_a_part_that_vanishes_is_a_miss_and_then_the_whole_may_be_written(fleet: Fleet) -> None:
    fleet.put(A, all_shards([2]))
    rank, store = fleet.rank(Shard(0, 1))
    assert rank.finds(A)
    store.delete([rank.remote.names.of(key_of(A, Shard(1, 2)))], 30)
    assert not rank.gets(A)
    assert rank.finds(A) == []
    rank.put(A)
    assert len(store.written) == 1
    assert fleet.rank(Shard(0, 1))[0].finds(A) == ["remote"]


@pytest.mark.parametrize("call", ["exists", "get", "put", "claim"])
@pytest.mark.parametrize("error", [RemoteStoreError("timeout", "too slow"), ValueError("a mistake of ours")])
def test_no_failure_is_raised_and_none_leaks(fleet: Fleet, call: str, error: Exception) -> None:
    fleet.put(A, all_shards([2]))
    rank, store = fleet.rank(Shard(0, 1))
    store.failing[call] = error
    assert bool(rank.finds(A)) == (call != "exists")
    assert rank.gets(A) == (call not in ("exists", "get"))
    rank.put(B)
    assert rank.remote.stats().failures
    rank.storage.clear()
    assert rank.memory.stats().entries == 0
    assert rank.memory.stats().used_bytes == 0


def test_chunks_in_pages_leave_no_mark(fleet: Fleet) -> None:
    rank, store = fleet.rank(Shard(0, 1))
    marks = OtherSizes(namespace(Shard(0, 1)), HEADS).marks
    fleet.put(A, all_shards([2]), layout="pages-1:some")
    assert store.exists(marks, 30) == [False] * len(SIZES)
    fleet.put(B, all_shards([2]))
    assert sum(store.exists(marks, 30)) == 1
    assert rank.finds(A) == ["resharded"], "that they are pages shows when they are read"
    assert not rank.gets(A)
    assert rank.resharded.stats().failures == {"read_unlike": 1}


def test_clear_is_for_all_sizes(fleet: Fleet) -> None:
    fleet.put(A, all_shards([2]))
    rank, _ = fleet.rank(Shard(0, 1))
    assert rank.finds(A) == ["resharded"]
    rank.storage.clear()
    assert rank.finds(A) == []


@pytest.mark.parametrize(("own", "heads"), [(Shard(0, 1), 1), (Shard(0, 1, 0, 2), 8)])
def test_with_one_head_or_several_stages_nothing_is_marked_or_asked_for(own: Shard, heads: int) -> None:
    sizes = OtherSizes(namespace(own), heads)
    assert sizes.shards == []
    assert not sizes.own_mark_is_missing
