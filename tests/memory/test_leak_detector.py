from __future__ import annotations

import torch

from lmcache.keys import Namespace, prefix_keys
from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.cpu import LocalCPUTier

SPEC = KVSpec(shape=(1, 2, 4, 2, 8), dtype=torch.float32, layout="token-major-1", num_tokens=4)
KEY = prefix_keys(Namespace(model="m", kv_dtype="float32", layout="l"), [1, 2, 3, 4], 4)[0]


def test_an_object_that_nobody_gave_back_is_named(leak_detector):
    pool = SlabAllocator(1 << 20)
    obj = pool.allocate(SPEC)
    (line,) = leak_detector.leaks(patience=0)
    assert "(1, 2, 4, 2, 8)" in line
    assert "1 references were not given back and no tier holds it" in line
    obj.ref_down()
    pool.close()


def test_a_leak_is_seen_after_its_pool_was_closed_and_its_object_forgotten(leak_detector):
    pool = SlabAllocator(1 << 20)
    pool.allocate(SPEC)
    pool.close()
    del pool
    assert len(leak_detector.leaks(patience=0)) == 1


def test_an_entry_of_an_open_tier_is_no_leak(leak_detector):
    tier = LocalCPUTier(1 << 20)
    with tier.allocate(SPEC) as obj:
        tier.submit_put(KEY, obj)
    assert leak_detector.leaks(patience=0) == []
    del tier
    assert leak_detector.leaks(patience=0) == [], "the next test must not be blamed for garbage"


def test_a_reader_of_an_open_tiers_entry_is_a_leak(leak_detector):
    tier = LocalCPUTier(1 << 20)
    with tier.allocate(SPEC) as obj:
        tier.submit_put(KEY, obj)
        (line,) = leak_detector.leaks(patience=0)
        assert "1 references besides that of its tier" in line
    tier.close()


def test_a_pin_is_a_leak(leak_detector):
    tier = LocalCPUTier(1 << 20)
    with tier.allocate(SPEC) as obj:
        tier.submit_put(KEY, obj)
    tier.pin(KEY)
    (line,) = leak_detector.leaks(patience=0)
    assert "still pinned 1 times" in line
    tier.close()


def test_the_tests_are_watched(pytestconfig, leak_detector):
    pool = SlabAllocator(1 << 20)
    assert pool in leak_detector._pools
    pool.close()
