"""What one process leaves, the next one finds."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmcache.storage.disk import DiskTierError
from lmcache.storage.disk.index import INDEX_FILE
from lmcache.storage.disk.lock import LOCK_FILE
from tests.storage.disk.helpers import (
    REPOSITORY,
    SPEC,
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

KEYS = [key_of(i) for i in range(10)]


def fill(directory: Path, heap: Heap) -> None:
    tier = open_tier(directory, heap)
    for key in KEYS:
        assert put(tier, heap, key)
    tier.close()


def test_everything_is_there_after_a_restart(tmp_path: Path, heap: Heap) -> None:
    fill(tmp_path, heap)
    tier = open_tier(tmp_path, heap)
    assert list(tier.keys()) == KEYS
    assert all(get(tier, key) == content(key, SPEC.nbytes) for key in KEYS)
    tier.close()
    assert not list((tmp_path / "tmp").iterdir())


def test_the_order_of_use_survives(tmp_path: Path, heap: Heap) -> None:
    fill(tmp_path, heap)
    tier = open_tier(tmp_path, heap)
    for key in (KEYS[0], KEYS[3]):
        get(tier, key)
    tier.close()
    small = open_tier(tmp_path, heap, capacity_for(3, tmp_path))
    assert list(small.keys()) == [KEYS[9], KEYS[0], KEYS[3]]
    small.close()


def test_a_smaller_capacity_holds_from_the_start(tmp_path: Path, heap: Heap) -> None:
    fill(tmp_path, heap)
    capacity = capacity_for(4, tmp_path)
    tier = open_tier(tmp_path, heap, capacity)
    # Already now, before anything could be written.
    assert len(chunk_files(tmp_path)) == 4
    assert bytes_on_disk(tmp_path) <= capacity
    assert tier.stats().evictions == 6
    tier.close()


def test_a_capacity_that_not_even_the_index_fits_is_refused(tmp_path: Path, heap: Heap) -> None:
    with pytest.raises(DiskTierError, match="raise max_local_disk_size"):
        open_tier(tmp_path, heap, 1 << 20)


def test_orphaned_files_are_swept_and_foreign_ones_are_not(tmp_path: Path, heap: Heap) -> None:
    fill(tmp_path, heap)
    orphan = tmp_path / "ff" / f"{0x12FF:x}.kv"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"what a power loss left")
    foreign = [tmp_path / "ff" / "notes.txt", tmp_path / "ff" / "z.kv", tmp_path / "ff" / f"{'f' * 40}.kv"]
    for path in foreign:
        path.write_text("mine")
    tier = open_tier(tmp_path, heap)
    deadline = time.monotonic() + 30
    while orphan.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not orphan.exists()
    assert all(path.exists() for path in foreign)
    assert len(chunk_files(tmp_path)) == len(KEYS) + 2
    tier.close()


@pytest.mark.parametrize("damage", ["noise", "version", "no table", "foreign", "page"])
def test_a_damaged_index_means_starting_empty(tmp_path: Path, heap: Heap, damage: str) -> None:
    fill(tmp_path, heap)
    path = tmp_path / INDEX_FILE
    if damage == "noise":
        path.write_bytes(os.urandom(8192))
    elif damage == "page":
        # The root of the table: opening works, reading does not.
        raw = bytearray(path.read_bytes())
        raw[4096 : 2 * 4096] = os.urandom(4096)
        path.write_bytes(raw)
    else:
        db = sqlite3.connect(path)
        if damage == "version":
            db.execute("PRAGMA user_version = 99")
        elif damage == "no table":
            db.execute("DROP TABLE chunk")
        else:
            db.execute("PRAGMA user_version = 0")
        db.commit()
        db.close()
    tier = open_tier(tmp_path, heap)
    assert list(tier.keys()) == []
    assert chunk_files(tmp_path) == []
    assert put(tier, heap, KEYS[0])
    assert tier.flush(30)
    tier.close()
    again = open_tier(tmp_path, heap)
    assert get(again, KEYS[0]) == content(KEYS[0], SPEC.nbytes)
    again.close()


def test_rows_that_make_no_sense_are_dropped_with_their_files(tmp_path: Path, heap: Heap) -> None:
    fill(tmp_path, heap)
    db = sqlite3.connect(tmp_path / INDEX_FILE)
    db.execute("UPDATE chunk SET key = x'00' WHERE file_id = 1")
    db.execute("UPDATE chunk SET spec = 'no json' WHERE file_id = 2")
    db.execute("UPDATE chunk SET kind = 17 WHERE file_id = 3")
    db.execute("UPDATE chunk SET last_use = x'ff00' WHERE file_id = 4")
    db.execute("UPDATE chunk SET last_use = 'text' WHERE file_id = 5")
    db.commit()
    db.close()
    tier = open_tier(tmp_path, heap)
    assert list(tier.keys()) == KEYS[5:]
    assert len(chunk_files(tmp_path)) == 5
    tier.close()


def test_an_unfinished_row_is_dropped_with_its_file(tmp_path: Path, heap: Heap) -> None:
    """Killed between the rename and the commit that says so."""
    fill(tmp_path, heap)
    db = sqlite3.connect(tmp_path / INDEX_FILE)
    db.execute("UPDATE chunk SET ready = 0 WHERE file_id = 4")
    db.commit()
    db.close()
    tier = open_tier(tmp_path, heap)
    assert not tier.contains(KEYS[3])
    assert len(chunk_files(tmp_path)) == 9
    tier.close()


def test_a_key_that_was_removed_and_put_again_is_the_new_one(tmp_path: Path, heap: Heap) -> None:
    tier = open_tier(tmp_path, heap)
    other = spec_of(20_000)
    for spec in (SPEC, other, SPEC, other):
        assert put(tier, heap, KEYS[0], spec)
        if spec is SPEC:
            assert tier.remove(KEYS[0])
        else:
            assert tier.flush(30)
            assert get(tier, KEYS[0]) == content(KEYS[0], other.nbytes)
            assert tier.remove(KEYS[0])
    assert put(tier, heap, KEYS[0], other)
    tier.close()
    assert len(chunk_files(tmp_path)) == 1
    again = open_tier(tmp_path, heap)
    assert get(again, KEYS[0]) == content(KEYS[0], other.nbytes)
    again.close()


def test_the_second_process_is_refused_with_words(tmp_path: Path, heap: Heap) -> None:
    tier = open_tier(tmp_path, heap)
    with pytest.raises(DiskTierError, match=f"in use by process PID {os.getpid()}; give each server"):
        open_tier(tmp_path, heap)
    tier.close()
    open_tier(tmp_path, heap).close()


HOLDING_FOR_A_MOMENT = """
import fcntl, sys, time

with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(0.3)
"""


def test_a_server_that_is_on_its_way_out_is_waited_for(tmp_path: Path, heap: Heap) -> None:
    held = [sys.executable, "-c", HOLDING_FOR_A_MOMENT, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(held, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        open_tier(tmp_path, heap).close()


def test_neither_forked_nor_spawned_children_keep_the_lock(tmp_path: Path, heap: Heap) -> None:
    tier = open_tier(tmp_path, heap)
    spawned = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    wait, go = os.pipe()
    hear, started = os.pipe()
    forked = os.fork()
    if forked == 0:
        os.close(go)
        os.write(started, b"!")
        os.read(wait, 1)
        os._exit(0)
    try:
        os.read(hear, 1)
        tier.close()
        open_tier(tmp_path, heap).close()
    finally:
        for end in (go, wait, hear, started):
            os.close(end)
        os.waitpid(forked, 0)
        spawned.communicate(b"\n")


FORKING_SERVER = """
import os, sys
from pathlib import Path
from tests.storage.disk.helpers import Heap, key_of, open_tier, put

tier, heap = open_tier(Path(sys.argv[1]), Heap()), Heap()
put(tier, heap, key_of(0))
tier.flush()
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert put(tier, heap, key_of(1))
    tier.flush()
    os.kill(os.getpid(), 9)
tier.close()
sys.exit(0)  # and with it the end of an interpreter that closes whatever is left
"""


def test_a_forked_child_that_ends_does_not_disturb_its_parent(tmp_path: Path, heap: Heap) -> None:
    """It closed the parent's database and removed the write-ahead log that the parent went on writing to."""
    command = [sys.executable, "-c", FORKING_SERVER, str(tmp_path)]
    server = subprocess.run(command, cwd=REPOSITORY, timeout=120, check=False)
    assert server.returncode == -9
    tier = open_tier(tmp_path, heap)
    for number in (0, 1):
        assert get(tier, key_of(number)) == content(key_of(number), SPEC.nbytes)
    tier.close()


def test_files_are_readable_by_their_owner_only(tmp_path: Path, heap: Heap) -> None:
    directory = tmp_path / "kv"
    fill(directory, heap)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (directory, *chunk_files(directory)))


ENDING_SERVER = """
import atexit, sys, threading
from pathlib import Path
from tests.storage.disk.helpers import Heap, key_of, open_tier, put

tier, heap = open_tier(Path(sys.argv[1]), Heap()), Heap()
atexit.register(tier.close)
tier._writer._catalog.take_work = (lambda take: lambda *a, **k: (ended.wait(20), take(*a, **k))[1])(
    tier._writer._catalog.take_work
)
ended = threading.Event()
threading._register_atexit(ended.set)  # the pools' own turn comes before the tier's
for number in range(10):
    put(tier, heap, key_of(number))
"""


def test_what_is_queued_when_the_interpreter_ends_is_written(tmp_path: Path, heap: Heap) -> None:
    """Pools take no work any more when what was registered with ``atexit`` runs: the writer died of it."""
    command = [sys.executable, "-c", ENDING_SERVER, str(tmp_path)]
    server = subprocess.run(command, cwd=REPOSITORY, timeout=120, check=False, capture_output=True, text=True)
    assert server.returncode == 0, server.stderr
    tier = open_tier(tmp_path, heap)
    assert [get(tier, key) for key in KEYS] == [content(key, SPEC.nbytes) for key in KEYS]
    tier.close()
