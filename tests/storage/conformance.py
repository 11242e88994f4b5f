"""What every storage tier must do, whatever its medium. A tier's test class inherits this and says how it is built.

    class TestMyTier(BoundedTierConformance):
        def make_tier(self, tmp_path, capacity_bytes, allocate):
            return MyTier(tmp_path, capacity_bytes, allocate=allocate)

Puts may be finished in the background: every helper here flushes before it looks.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmcache.keys import CacheKey, Namespace, PrefixKey, SegmentKey, prefix_keys, segment_key
from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.storage.interface import Allocate, StorageTier

NAMESPACE = Namespace(model="conformance", kv_dtype="bfloat16", layout="token-major-1")
SPEC = KVSpec(shape=(2, 2, 16, 2, 64), dtype=torch.bfloat16, layout="token-major-1", num_tokens=16)
"""16 KiB of KV: four pages, so that every medium stores it without padding."""

ENTRIES = 8
"""How many objects of ``SPEC`` the tier under test has room for."""


def make_keys(count: int, first: int = 0) -> list[PrefixKey]:
    return [prefix_keys(NAMESPACE, [first + i] * 4, 4)[0] for i in range(count)]


def fill(obj: MemoryObj, key: CacheKey) -> None:
    """Bytes that only ``key`` has, so that a mix-up shows."""
    obj.bytes.copy_(expected_bytes(key, obj.spec.nbytes))


def expected_bytes(key: CacheKey, nbytes: int) -> torch.Tensor:
    pattern = torch.frombuffer(bytearray(key.digest), dtype=torch.uint8)
    return pattern.repeat(-(-nbytes // len(pattern)))[:nbytes]


class TierConformance:
    """Inherit, implement :meth:`make_tier`, and override the rest only where the medium differs."""

    entry_overhead = 0
    """Bytes that the tier counts for an entry besides ``SPEC.nbytes`` (a file header, say)."""

    def make_tier(self, tmp_path: Path, capacity_bytes: int, allocate: Allocate) -> StorageTier:
        """A fresh, empty tier with LRU eviction; ``allocate`` is where objects that it reads are to be put."""
        raise NotImplementedError

    def allocate(self, tier: StorageTier, spec: KVSpec) -> MemoryObj | None:
        """Where a caller gets the object that it is going to put into ``tier``."""
        return self.pool.allocate(spec)

    # --- set-up ----------------------------------------------------------------------------------------------------

    pool: SlabAllocator

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[StorageTier]:
        self.pool = SlabAllocator(8 << 20)
        tier = self.make_tier(tmp_path, ENTRIES * (SPEC.nbytes + self.entry_overhead), self.pool.allocate)
        yield tier
        tier.close()
        self.pool.close()

    def put(self, tier: StorageTier, key: CacheKey, spec: KVSpec = SPEC) -> bool:
        """Store the bytes of ``key`` and wait; False where the tier would not keep them."""
        obj = self.allocate(tier, spec)
        if obj is None:
            return False
        with obj:
            fill(obj, key)
            accepted = tier.submit_put(key, obj)
        assert tier.flush(timeout=60)
        return accepted

    def assert_holds(self, tier: StorageTier, key: CacheKey, spec: KVSpec = SPEC) -> None:
        obj = tier.submit_get(key).result(timeout=60)
        assert obj is not None, f"{key!r} is missing from the {tier.name} tier"
        with obj:
            assert obj.spec == spec
            assert torch.equal(obj.bytes, expected_bytes(key, spec.nbytes))

    def assert_misses(self, tier: StorageTier, key: CacheKey) -> None:
        assert not tier.contains(key)
        assert tier.submit_get(key).result(timeout=60) is None

    # --- getting back what was put ---------------------------------------------------------------------------------

    def test_a_new_tier_is_empty(self, tier: StorageTier) -> None:
        (key,) = make_keys(1)
        self.assert_misses(tier, key)
        assert list(tier.keys()) == []
        stats = tier.stats()
        assert (stats.entries, stats.used_bytes, stats.hits, stats.evictions) == (0, 0, 0, 0)

    def test_what_was_put_comes_back(self, tier: StorageTier) -> None:
        keys = make_keys(3)
        for key in keys:
            assert self.put(tier, key)
        for key in keys:
            assert tier.contains(key)
            self.assert_holds(tier, key)
        assert set(tier.keys()) == set(keys)

    def test_prefix_and_segment_of_the_same_tokens_are_two_entries(self, tier: StorageTier) -> None:
        prefix = prefix_keys(NAMESPACE, [1, 2, 3, 4], 4)[0]
        segment = segment_key(NAMESPACE, [1, 2, 3, 4])
        assert self.put(tier, prefix)
        self.assert_misses(tier, segment)
        assert self.put(tier, segment)
        self.assert_holds(tier, prefix)
        self.assert_holds(tier, segment)
        assert {type(key) for key in tier.keys()} == {PrefixKey, SegmentKey}  # noqa: SIM118 - not a mapping

    def test_sizes_and_dtypes_are_kept_apart(self, tier: StorageTier) -> None:
        specs = [
            KVSpec(shape=(1, 2, 5, 3, 7), dtype=torch.float32, layout="token-major-1", num_tokens=5),
            KVSpec(shape=(3, 1, 11), dtype=torch.uint8, layout="pages-of-some-engine", num_tokens=11),
            KVSpec(shape=(1, 2, 3, 1, 64), dtype=torch.float16, layout="token-major-1", num_tokens=3),
        ]
        keys = make_keys(len(specs))
        for key, spec in zip(keys, specs, strict=True):
            assert self.put(tier, key, spec)
        for key, spec in zip(keys, specs, strict=True):
            self.assert_holds(tier, key, spec)

    def test_a_second_put_keeps_the_first_bytes(self, tier: StorageTier) -> None:
        (key,) = make_keys(1)
        assert self.put(tier, key)
        obj = self.allocate(tier, SPEC)
        assert obj is not None
        with obj:
            obj.bytes.zero_()
            assert tier.submit_put(key, obj)
        assert tier.flush(timeout=60)
        self.assert_holds(tier, key)
        assert tier.stats().entries == 1

    def test_the_caller_may_go_before_the_put_is_done(self, tier: StorageTier) -> None:
        (key,) = make_keys(1)
        obj = self.allocate(tier, SPEC)
        assert obj is not None
        fill(obj, key)
        assert tier.submit_put(key, obj)
        obj.ref_down()
        assert tier.flush(timeout=60)
        self.assert_holds(tier, key)

    def test_a_reader_keeps_its_bytes_after_the_entry_went(self, tier: StorageTier) -> None:
        (key,) = make_keys(1)
        assert self.put(tier, key)
        obj = tier.submit_get(key).result(timeout=60)
        assert obj is not None
        with obj:
            assert tier.remove(key)
            self.assert_misses(tier, key)
            assert torch.equal(obj.bytes, expected_bytes(key, SPEC.nbytes))

    # --- forgetting ------------------------------------------------------------------------------------------------

    def test_remove(self, tier: StorageTier) -> None:
        (key,) = make_keys(1)
        assert not tier.remove(key)
        assert self.put(tier, key)
        assert tier.remove(key)
        assert not tier.remove(key)
        self.assert_misses(tier, key)
        assert tier.stats().used_bytes == 0
        assert self.put(tier, key)
        self.assert_holds(tier, key)

    # --- counters and end ------------------------------------------------------------------------------------------

    def test_hits_and_misses_are_counted(self, tier: StorageTier) -> None:
        present, absent = make_keys(2)
        assert self.put(tier, present)
        self.assert_holds(tier, present)
        self.assert_holds(tier, present)
        self.assert_misses(tier, absent)
        stats = tier.stats()
        assert (stats.entries, stats.hits, stats.misses) == (1, 2, 1)

    def test_closing_gives_everything_back(self, tier: StorageTier) -> None:
        keys = make_keys(3)
        for key in keys:
            assert self.put(tier, key)
        assert tier.pin(keys[0])
        tier.close()
        tier.close()

    def test_a_closed_tier_misses(self, tier: StorageTier) -> None:
        first, second = make_keys(2)
        assert self.put(tier, first)
        spare = self.pool.allocate(SPEC)
        assert spare is not None
        tier.close()
        with spare:
            assert not tier.submit_put(second, spare)
        assert tier.submit_get(first).result(timeout=60) is None
        assert tier.flush(timeout=60)

    # --- threads ---------------------------------------------------------------------------------------------------

    def test_threads_never_see_each_others_bytes(self, tier: StorageTier) -> None:
        keys = make_keys(3 * ENTRIES)
        problems: list[BaseException] = []

        def work(seed: int) -> None:
            choose = random.Random(seed)
            try:
                for _ in range(150):
                    key = choose.choice(keys)
                    action = choose.random()
                    if action < 0.4:
                        self._put_in_background(tier, key)
                    elif action < 0.8:
                        self._check_if_there(tier, key)
                    elif action < 0.9 and tier.pin(key):
                        self._check_if_there(tier, key)
                        tier.unpin(key)
                    else:
                        tier.remove(key)
                    self.check_while_busy(tier)
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert problems == []
        assert tier.flush(timeout=60)
        tier.clear()
        assert list(tier.keys()) == []
        assert tier.stats().used_bytes == 0

    def check_while_busy(self, tier: StorageTier) -> None:
        """What must hold at any moment."""

    def _put_in_background(self, tier: StorageTier, key: CacheKey) -> None:
        obj = self.allocate(tier, SPEC)
        if obj is not None:
            with obj:
                fill(obj, key)
                tier.submit_put(key, obj)

    def _check_if_there(self, tier: StorageTier, key: CacheKey) -> None:
        obj = tier.submit_get(key).result(timeout=60)
        if obj is not None:
            with obj:
                assert torch.equal(obj.bytes, expected_bytes(key, SPEC.nbytes))


class BoundedTierConformance(TierConformance):
    """Of a tier that has so much room, evicts by itself and can be told what to keep."""

    def test_it_says_how_much_room_it_has(self, tier: StorageTier) -> None:
        assert tier.stats().capacity_bytes == ENTRIES * (SPEC.nbytes + self.entry_overhead)

    def check_while_busy(self, tier: StorageTier) -> None:
        stats = tier.stats()
        assert stats.used_bytes <= stats.capacity_bytes

    # --- room ------------------------------------------------------------------------------------------------------

    def test_never_over_its_capacity(self, tier: StorageTier) -> None:
        keys = make_keys(5 * ENTRIES)
        for key in keys:
            assert self.put(tier, key)
            stats = tier.stats()
            assert 0 < stats.used_bytes <= stats.capacity_bytes
            self.assert_holds(tier, key)
        assert 1 <= tier.stats().entries <= ENTRIES
        assert tier.stats().evictions == len(keys) - tier.stats().entries
        for left in tier.keys():  # noqa: SIM118 - not a mapping
            self.assert_holds(tier, left)

    def test_the_coldest_goes_first(self, tier: StorageTier) -> None:
        keys = make_keys(ENTRIES + 1)
        for key in keys[:ENTRIES]:
            assert self.put(tier, key)
        self.assert_holds(tier, keys[0])
        assert self.put(tier, keys[ENTRIES])
        assert tier.contains(keys[0])
        assert not tier.contains(keys[1])

    def test_keys_are_listed_coldest_first(self, tier: StorageTier) -> None:
        keys = make_keys(3)
        for key in keys:
            assert self.put(tier, key)
        self.assert_holds(tier, keys[0])
        assert list(tier.keys()) == [keys[1], keys[2], keys[0]]

    def test_what_can_never_fit_is_refused_and_evicts_nothing(self, tier: StorageTier) -> None:
        (small, large) = make_keys(2)
        assert self.put(tier, small)
        huge = KVSpec(shape=(4 << 20,), dtype=torch.uint8, layout="pages-of-some-engine", num_tokens=1)
        assert not self.put(tier, large, huge)
        self.assert_misses(tier, large)
        self.assert_holds(tier, small)

    # --- pins ------------------------------------------------------------------------------------------------------

    def test_a_pinned_entry_outlives_any_number_of_others(self, tier: StorageTier) -> None:
        pinned, *others = make_keys(4 * ENTRIES)
        assert self.put(tier, pinned)
        assert tier.pin(pinned)
        for key in others:
            assert self.put(tier, key)
        self.assert_holds(tier, pinned)
        tier.unpin(pinned)

    def test_pins_are_counted(self, tier: StorageTier) -> None:
        (key,) = make_keys(1)
        assert self.put(tier, key)
        assert tier.pin(key)
        assert tier.pin(key)
        tier.unpin(key)
        assert not tier.remove(key)
        tier.unpin(key)
        assert tier.remove(key)

    def test_an_unpinned_entry_can_go_again(self, tier: StorageTier) -> None:
        pinned, *others = make_keys(4 * ENTRIES)
        assert self.put(tier, pinned)
        assert tier.pin(pinned)
        tier.unpin(pinned)
        for key in others:
            assert self.put(tier, key)
        assert not tier.contains(pinned)

    def test_pinning_what_is_not_there(self, tier: StorageTier) -> None:
        (key,) = make_keys(1)
        assert not tier.pin(key)
        tier.unpin(key)
        assert self.put(tier, key)
        assert tier.remove(key)

    def test_full_of_pinned_entries_means_no_and_nothing_is_lost(self, tier: StorageTier) -> None:
        *keys, extra = make_keys(ENTRIES + 1)
        for key in keys:
            assert self.put(tier, key)
            assert tier.pin(key)
        assert not self.put(tier, extra)
        assert not tier.contains(extra)
        for key in keys:
            self.assert_holds(tier, key)
            tier.unpin(key)
        assert self.put(tier, extra)

    def test_clear_spares_what_is_pinned(self, tier: StorageTier) -> None:
        keys = make_keys(4)
        for key in keys:
            assert self.put(tier, key)
        assert tier.pin(keys[2])
        assert tier.clear() == 3
        assert list(tier.keys()) == [keys[2]]
        tier.unpin(keys[2])
        assert tier.clear() == 1
        assert (tier.stats().entries, tier.stats().used_bytes) == (0, 0)
