from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.interface import Allocate, StorageTier
from lmcache.storage.policies import POLICIES
from tests.storage.conformance import ENTRIES, SPEC, BoundedTierConformance, fill, make_keys


class TestLocalCPUTier(BoundedTierConformance):
    def make_tier(self, tmp_path: Path, capacity_bytes: int, allocate: Allocate) -> StorageTier:
        return LocalCPUTier(capacity_bytes)

    def allocate(self, tier: StorageTier, spec: KVSpec) -> MemoryObj | None:
        assert isinstance(tier, LocalCPUTier)
        return tier.allocate(spec)


@pytest.fixture(params=sorted(POLICIES))
def tier(request):
    tier = LocalCPUTier(ENTRIES * SPEC.nbytes, request.param)
    yield tier
    tier.close()


def put(tier, key, spec=SPEC):
    with tier.allocate(spec) as obj:
        fill(obj, key)
        assert tier.submit_put(key, obj)


def test_a_hit_is_the_object_itself_and_its_future_is_done(tier):
    (key,) = make_keys(1)
    put(tier, key)
    future = tier.submit_get(key)
    assert future.done()
    with future.result() as first, tier.get(key) as second:
        assert first is second
        assert first.ref_count == 3


def test_an_entry_in_flight_is_never_evicted(tier):
    held, *others = make_keys(4 * ENTRIES)
    put(tier, held)
    with tier.get(held) as obj:
        before = obj.bytes.clone()
        for key in others:
            put(tier, key)
        assert tier.contains(held)
        assert torch.equal(obj.bytes, before)


def test_an_object_that_was_not_put_yet_is_never_evicted(tier):
    first, *others = make_keys(4 * ENTRIES)
    with tier.allocate(SPEC) as filling:
        filling.bytes.fill_(7)
        for key in others:
            put(tier, key)
        assert bool((filling.bytes == 7).all())
        assert tier.submit_put(first, filling)
    assert tier.contains(first)


def test_no_room_while_everything_is_in_flight(tier):
    keys = make_keys(ENTRIES)
    for key in keys:
        put(tier, key)
    held = [tier.get(key) for key in keys]
    assert tier.allocate(SPEC) is None
    assert tier.stats().failures == {"pool_full": 1}
    held.pop().ref_down()
    with tier.allocate(SPEC):
        pass
    for obj in held:
        obj.ref_down()


def test_a_large_object_evicts_as_many_small_ones_as_it_needs(tier):
    keys = make_keys(ENTRIES)
    for key in keys:
        put(tier, key)
    half = KVSpec(shape=(ENTRIES // 2 * SPEC.nbytes,), dtype=torch.uint8, layout="bytes", num_tokens=1)
    with tier.allocate(half) as obj:
        assert obj.bytes.shape == (half.nbytes,)
    assert tier.stats().entries >= ENTRIES // 2 - 1


def test_clear_spares_what_is_in_flight(tier):
    keys = make_keys(3)
    for key in keys:
        put(tier, key)
    with tier.get(keys[1]):
        assert tier.clear() == 2
        assert list(tier.keys()) == [keys[1]]
    assert tier.clear() == 1


def test_a_reader_outlives_the_tier():
    """The engine may shut down while a copy to the GPU is still under way."""
    (key,) = make_keys(1)
    tier = LocalCPUTier(ENTRIES * SPEC.nbytes)
    put(tier, key)
    obj = tier.get(key)
    before = obj.bytes.clone()
    tier.close()
    assert torch.equal(obj.bytes, before)
    obj.ref_down()
    assert tier.pool.stats().reserved_bytes == 0


def test_an_object_of_another_pool_is_refused(tier):
    (key,) = make_keys(1)
    foreign = SlabAllocator(1 << 20)
    with foreign.allocate(SPEC) as obj, pytest.raises(ValueError, match="not of this tier's pool"):
        tier.submit_put(key, obj)
    foreign.close()


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="'MRU': must be one of LRU, LFU, FIFO, S3FIFO"):
        LocalCPUTier(1 << 20, "MRU")
