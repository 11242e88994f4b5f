"""Killed with SIGKILL at any moment: no wrong bytes, nothing finished is lost, nothing is left over."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

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

KILLS = 100
SPECS = [spec_of(nbytes) for nbytes in (3_000, 40_000, 700_000)]
NUM_KEYS = 120


def write_until_killed(directory: Path, capacity: int, seed: int, said: int) -> None:
    """Puts, removes and reads; says which keys are finished, one line each, before it goes on to the next."""
    choose, heap = random.Random(seed), Heap()
    tier = open_tier(directory, heap, capacity)
    while True:
        batch = [choose.randrange(NUM_KEYS) for _ in range(choose.randint(1, 6))]
        for number in batch:
            if choose.random() < 0.1:
                os.write(said, f"- {number}\n".encode())
                tier.remove(key_of(number))
            else:
                put(tier, heap, key_of(number), SPECS[number % 3])
                get(tier, key_of(choose.randrange(NUM_KEYS)))
        tier.flush()
        for number in batch:
            if tier.contains(key_of(number)):
                os.write(said, f"+ {number}\n".encode())


def run_and_kill(directory: Path, capacity: int, seed: int) -> str:
    """What the writer said until it was killed."""
    hear, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(hear)
            write_until_killed(directory, capacity, seed, said)
        finally:
            os._exit(1)
    os.close(said)
    with os.fdopen(hear) as lines:
        # Every other time not before something was finished, however slow the machine.
        words = lines.readline() if seed % 2 else ""
        time.sleep(random.Random(seed).uniform(0.001, 0.12))
        os.kill(child, signal.SIGKILL)
        words += lines.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    return words


@pytest.mark.slow
@pytest.mark.parametrize("room", ["enough", "tight"])
def test_killed_at_any_moment(tmp_path: Path, room: str) -> None:
    heap = Heap()
    capacity = 512 << 20 if room == "enough" else capacity_for(20, tmp_path, SPECS[2])
    finished: set[int] = set()
    survivors = 0
    for seed in range(KILLS // 2):
        for line in run_and_kill(tmp_path, capacity, seed).splitlines():
            what, number = line.split()
            (finished.add if what == "+" else finished.discard)(int(number))
        assert bytes_on_disk(tmp_path) <= capacity

        tier = open_tier(tmp_path, heap, capacity)
        assert tier.flush(30)
        assert list((tmp_path / "tmp").iterdir()) == []
        for number in range(NUM_KEYS):
            found = get(tier, key_of(number))
            assert found is None or found == content(key_of(number), SPECS[number % 3].nbytes)
            if room == "enough" and number in finished:
                assert found is not None, f"{number} was finished and is lost"
            survivors += found is not None
        # A file that was removed and whose row was not yet: found out here. Nothing else can be wrong.
        assert set(tier.stats().failures) <= {"read_enoent"}
        entries = tier.stats().entries
        tier.close()
        # Neither a file without an entry nor an entry without a file.
        assert len(chunk_files(tmp_path)) == entries
        assert bytes_on_disk(tmp_path) <= capacity
    assert survivors > 0
    assert heap.live == 0
