"""Objects of mixed sizes come and go: room is always found, and little of the pool lies idle.

*Overhead* is the share of the pool that holds nothing right after an object was placed that needed an eviction: holes
too small for it, and what was evicted beyond need. The pool is a scaled-down one (1 GiB; objects of 64 KiB … 16 MiB),
never written to, so that it costs no memory. Everything is seeded: the figures are the same in every run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from lmcache.keys import KEY_BYTES, PrefixKey
from lmcache.memory.memory_obj import KVSpec
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.policies import POLICIES

KIB, MIB = 1 << 10, 1 << 20
CAPACITY, SLAB = 1024 * MIB, 128 * MIB
SMALLEST, LARGEST = 64 * KIB, 16 * MIB


def sizes(mix: str, choose: random.Random) -> Iterator[int]:
    while True:
        if mix == "chunks and segments" and choose.random() < 0.5:
            yield MIB
        elif mix == "uniform":
            yield choose.randrange(SMALLEST, LARGEST)
        else:
            yield int(SMALLEST * (LARGEST / SMALLEST) ** choose.random())


def spec(nbytes: int) -> KVSpec:
    return KVSpec(shape=(nbytes,), dtype=torch.uint8, layout="bytes", num_tokens=1)


def key(number: int) -> PrefixKey:
    return PrefixKey(number.to_bytes(KEY_BYTES, "big"))


def churn(tier: LocalCPUTier, mix: str, operations: int) -> tuple[float, float]:
    """Peak and mean overhead over ``operations`` gets (a third) and puts. Fails when an object finds no room."""
    choose = random.Random(0)
    draw = sizes(mix, choose)
    stored = placed = 0
    peak = total = 0.0
    for _ in range(operations):
        if stored and choose.random() < 0.33:
            obj = tier.get(key(choose.randrange(max(0, stored - 1_000), stored)))
            if obj is not None:
                obj.ref_down()
            continue
        evictions = tier.stats().evictions
        obj = tier.allocate(spec(next(draw)))
        assert obj is not None, f"no room although {len(tier.keys())} entries could be evicted"
        if tier.stats().evictions > evictions:
            overhead = 1 - tier.pool.used_bytes / tier.pool.capacity_bytes
            peak = max(peak, overhead)
            total += overhead
            placed += 1
        with obj:
            tier.submit_put(key(stored), obj)
        stored += 1
    return peak, total / placed


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Iterator[LocalCPUTier]:
    tier = LocalCPUTier(CAPACITY, request.param, slab_bytes=SLAB)
    yield tier
    tier.close()


def report(tier: LocalCPUTier, mix: str, operations: int) -> None:
    peak, mean = churn(tier, mix, operations)
    print(f"\n{operations:,} operations, {mix}, {tier._policy.name}: overhead peak {peak:.1%}, mean {mean:.1%}")
    assert peak < 0.20
    assert mean < 0.10


@pytest.mark.parametrize("mix", ["chunks and segments", "uniform", "log-uniform"])
@pytest.mark.parametrize("tier", ["LRU"], indirect=True)
def test_every_mix(tier: LocalCPUTier, mix: str) -> None:
    report(tier, mix, 10_000)


@pytest.mark.parametrize("tier", sorted(POLICIES), indirect=True)
def test_every_policy(tier: LocalCPUTier) -> None:
    report(tier, "log-uniform", 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["LRU"], indirect=True)
def test_a_million_operations(tier: LocalCPUTier) -> None:
    report(tier, "log-uniform", 1_000_000)


def fill_with_chunks(tier: LocalCPUTier, nbytes: int) -> None:
    for number in range(tier.pool.capacity_bytes // nbytes):
        with tier.allocate(spec(nbytes)) as obj:
            tier.submit_put(key(number), obj)


@pytest.mark.parametrize("tier", sorted(POLICIES), indirect=True)
def test_room_is_found_between_pinned_entries(tier: LocalCPUTier) -> None:
    """Every 32nd MiB is pinned. The policy's order alone would not care, and would miss the holes in between."""
    fill_with_chunks(tier, MIB)
    pinned = [key(number) for number in range(0, 1024, 32)]
    for name in pinned:
        assert tier.pin(name)
    with tier.allocate(spec(31 * MIB)):
        assert all(map(tier.contains, pinned))
        assert tier.stats().evictions <= 2 * 31
    left = tier.stats().entries
    assert tier.allocate(spec(33 * MIB)) is None
    assert tier.stats().entries >= left - 33, "evicted on although no hole could come of it"
    for name in pinned:
        tier.unpin(name)


@pytest.mark.parametrize("tier", ["LRU"], indirect=True)
def test_an_object_larger_than_a_slab_spares_what_it_can(tier: LocalCPUTier) -> None:
    fill_with_chunks(tier, MIB)
    assert tier.pin(key(0))
    with tier.allocate(spec(200 * MIB)):
        assert tier.contains(key(0))
        assert tier.stats().entries >= 500
    tier.unpin(key(0))
