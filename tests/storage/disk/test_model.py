"""Any sequence of operations and restarts against a dict."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmcache.storage.disk.chunk_file import chunk_file_bytes
from tests.storage.disk.helpers import (
    Heap,
    bytes_on_disk,
    capacity_for,
    chunk_files,
    content,
    get,
    key_of,
    open_tier,
    put,
    spec_of,
)

NUMBERS = st.integers(0, 11)
SPECS = [spec_of(nbytes) for nbytes in (1, 4096, 9_000)]


class DiskTierMachine(RuleBasedStateMachine):
    """``entries`` is what must be there while there is room for all; when it is tight, what may be there."""

    @initialize(roomy=st.booleans())
    def start(self, roomy: bool) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.heap = Heap()
        self.roomy = roomy
        self.capacity = capacity_for(12 if roomy else 4, self.directory, SPECS[-1])
        self.tier = open_tier(self.directory, self.heap, self.capacity)
        self.entries: dict[int, int] = {}
        self.pinned: set[int] = set()

    @rule(number=NUMBERS, size=st.integers(0, 2))
    def put(self, number: int, size: int) -> None:
        kept = self.tier.contains(key_of(number))
        if put(self.tier, self.heap, key_of(number), SPECS[size]) and not kept:
            self.entries[number] = size

    @rule(number=NUMBERS)
    def get(self, number: int) -> None:
        found = get(self.tier, key_of(number))
        if found is None:
            assert not self.tier.contains(key_of(number))
            assert not self.roomy or number not in self.entries
        else:
            assert found == content(key_of(number), SPECS[self.entries[number]].nbytes)

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        was_there = self.tier.contains(key_of(number))
        assert self.tier.remove(key_of(number)) == (was_there and number not in self.pinned)
        if number not in self.pinned:
            self.entries.pop(number, None)

    @rule(number=NUMBERS)
    def pin(self, number: int) -> None:
        if len(self.pinned) < 2 and self.tier.pin(key_of(number)):
            self.pinned.add(number)

    @rule(number=NUMBERS)
    def unpin(self, number: int) -> None:
        if number in self.pinned:
            self.pinned.remove(number)
            self.tier.unpin(key_of(number))

    @rule()
    def clear(self) -> None:
        assert self.tier.flush(30)
        self.tier.clear()
        self.entries = {number: size for number, size in self.entries.items() if number in self.pinned}
        assert {key_of(number) for number in self.entries} == set(self.tier.keys())

    @rule()
    def flush(self) -> None:
        assert self.tier.flush(30)
        stats = self.tier.stats()
        assert stats.entries == len(self.tier.keys()) == len(chunk_files(self.directory))

    @rule()
    def restart(self) -> None:
        order = self.tier.keys()
        self.tier.close()
        self.tier = open_tier(self.directory, self.heap, self.capacity)
        self.pinned.clear()
        assert self.tier.keys() == order

    @invariant()
    def within_capacity(self) -> None:
        if hasattr(self, "tier"):
            stats = self.tier.stats()
            assert stats.used_bytes <= stats.capacity_bytes
            assert bytes_on_disk(self.directory) <= self.capacity
            assert stats.failures == {}

    @invariant()
    def pinned_entries_are_there(self) -> None:
        for number in getattr(self, "pinned", ()):
            assert self.tier.contains(key_of(number))

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()
            assert self.heap.live == 0
            expected = sum(chunk_file_bytes(SPECS[self.entries[n]].nbytes) for n in self.entries)
            assert sum(path.stat().st_size for path in chunk_files(self.directory)) <= expected
            shutil.rmtree(self.directory)


TestDiskTier = DiskTierMachine.TestCase
TestDiskTier.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
