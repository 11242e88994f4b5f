"""Never over the capacity, not for an instant: watched from outside while the tier is as busy as it can be."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from tests.storage.disk.helpers import Heap, bytes_on_disk, capacity_for, get, key_of, open_tier, put, spec_of


class Watcher(threading.Thread):
    """Adds up what lies in a directory, over and over, and keeps the most that it saw."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self.most = self.looks = 0
        self._directory = directory
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.is_set():
            self.most = max(self.most, bytes_on_disk(self._directory))
            self.looks += 1

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


@pytest.mark.parametrize("nbytes", [500, 60_000, 1_500_000])
def test_a_watcher_never_sees_more_than_the_capacity(tmp_path: Path, heap: Heap, nbytes: int) -> None:
    specs = [spec_of(nbytes), spec_of(nbytes // 2), spec_of(nbytes // 3)]
    capacity = capacity_for(12, tmp_path, specs[0])
    tier = open_tier(tmp_path, heap, capacity, write_threads=4)
    watcher = Watcher(tmp_path)
    watcher.start()
    choose = random.Random(nbytes)
    for number in range(400):
        put(tier, heap, key_of(number), choose.choice(specs))
        if number % 7 == 0:
            get(tier, key_of(max(0, number - choose.randrange(12))))
        if number % 13 == 0:
            tier.remove(key_of(max(0, number - choose.randrange(12))))
        if number % 60 == 59:
            tier.close()
            tier = open_tier(tmp_path, heap, capacity, write_threads=4)
    assert tier.flush(60)
    assert tier.stats().failures == {}
    tier.close()
    watcher.stop()
    assert watcher.looks > 10
    assert capacity_for(3, tmp_path, specs[2]) - capacity_for(0, tmp_path) < watcher.most <= capacity


def test_many_small_entries_and_their_index_stay_within_the_capacity(tmp_path: Path, heap: Heap) -> None:
    """The index and the directories grow with the entries: they are part of the account."""
    spec = spec_of(64)
    capacity = capacity_for(3_000, tmp_path, spec)
    tier = open_tier(tmp_path, heap, capacity)
    for number in range(4_000):
        put(tier, heap, key_of(number), spec)
        if number % 500 == 0:
            assert tier.flush(60)
            assert bytes_on_disk(tmp_path) <= capacity
    assert tier.flush(60)
    assert tier.stats().entries == 3_000
    assert bytes_on_disk(tmp_path) <= capacity
    tier.close()
    assert bytes_on_disk(tmp_path) <= capacity


def test_a_chunk_larger_than_the_write_queue_is_dropped(tmp_path: Path, heap: Heap) -> None:
    tier = open_tier(tmp_path, heap, write_queue_bytes=16_384)
    assert not put(tier, heap, key_of(1), spec_of(20_000))
    assert put(tier, heap, key_of(2), spec_of(10_000))
    assert tier.stats().dropped_puts == 1
    tier.close()
