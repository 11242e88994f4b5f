"""Memory that is shared: of huge pages where there are some, of ordinary ones where there are not."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from lmcache.memory import shared_memory
from lmcache.memory.allocator import SlabAllocator
from lmcache.memory.memory_obj import KVSpec
from lmcache.memory.shared_memory import HUGE_PAGE, SharedMemorySource, make_shared
from lmcache.memory.slab import Slab
from tests.eventually import eventually
from tests.memory.huge_pages import free_huge_pages, need_huge_pages, page_sizes_of_slabs

MIB = 1 << 20


def spec(nbytes: int) -> KVSpec:
    return KVSpec(shape=(nbytes,), dtype=torch.uint8, layout="bytes", num_tokens=1)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_under_way() -> None:
    """What earlier tests had made ahead is back."""
    wait_for_what_is_made_ahead()


def wait_for_what_is_made_ahead() -> None:
    for thread in threading.enumerate():
        if thread.name == "lmcache-huge-pages":
            thread.join()


@pytest.fixture
def lacking(monkeypatch):
    """As if a container allowed no huge pages, which shows only when they are to be given out."""
    attempts = []

    def refuse(descriptor: int, offset: int, nbytes: int) -> None:
        attempts.append(nbytes)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    return attempts


def test_huge_pages_are_taken_and_given_back() -> None:
    need_huge_pages(2)
    free = free_huge_pages()
    memory = make_shared(2 * HUGE_PAGE, huge_pages=True)
    assert memory.huge
    ours = Slab(0, memory.nbytes, pin=False, descriptor=memory.descriptor, huge=True)
    assert free_huge_pages() == free - 2, "all of it is there before it is first touched"
    assert page_sizes_of_slabs() == {HUGE_PAGE}
    theirs = Slab(0, memory.nbytes, pin=False, descriptor=os.dup(memory.descriptor))
    ours.buffer.fill_(7)
    assert bool((theirs.buffer == 7).all())
    ours.discard()
    assert free_huge_pages() == free, "although others have still mapped it"
    theirs.close()


def test_other_sizes_are_of_ordinary_pages() -> None:
    memory = make_shared(HUGE_PAGE + 4096, huge_pages=True)
    assert not memory.huge
    slab = Slab(0, memory.nbytes, pin=False, descriptor=memory.descriptor)
    slab.buffer.fill_(1)
    slab.close()


def test_more_than_there_are_is_of_ordinary_pages() -> None:
    """Half of them huge would be a slab whose other half kills whoever touches it."""
    before, free = open_descriptors(), free_huge_pages()
    memory = make_shared((free + 1) * HUGE_PAGE, huge_pages=True)
    assert not memory.huge
    assert free_huge_pages() == free
    slab = Slab(0, memory.nbytes, pin=False, descriptor=memory.descriptor)
    slab.buffer[-HUGE_PAGE:].fill_(1)
    slab.close()
    del slab
    assert open_descriptors() == before


def test_pages_that_are_promised_but_not_given_out_count_as_none(lacking: list[int]) -> None:
    before, free = open_descriptors(), free_huge_pages()
    memory = make_shared(HUGE_PAGE, huge_pages=True)
    assert not memory.huge
    os.close(memory.descriptor)
    assert lacking == ([HUGE_PAGE] if free else [])
    assert (open_descriptors(), free_huge_pages()) == (before, free)


def test_a_system_without_them(monkeypatch, caplog) -> None:
    create = os.memfd_create

    def refuse_huge(name: str, flags: int) -> int:
        if flags & os.MFD_HUGETLB:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", refuse_huge)
    monkeypatch.setattr(shared_memory, "_COUNTS", Path("/nowhere"))
    with caplog.at_level(logging.INFO):
        pool = SlabAllocator(4 * MIB, pin_memory=False, shared=SharedMemorySource())
        with pool.allocate(spec(MIB)) as obj:
            obj.bytes.fill_(1)
    pool.close()
    assert caplog.text == "", "there is nothing to set"


def test_the_log_says_once_what_to_set(lacking, monkeypatch, caplog, tmp_path) -> None:
    for what, number in {"nr": 30, "free": 12, "resv": 2}.items():
        (tmp_path / f"{what}_hugepages").write_text(f"{number}\n")
    monkeypatch.setattr(shared_memory, "_COUNTS", tmp_path)
    pool = SlabAllocator(16 * MIB, slab_bytes=4 * MIB, pin_memory=False, shared=SharedMemorySource())
    with caplog.at_level(logging.INFO):
        objs = [pool.allocate(spec(4 * MIB)) for _ in range(3)]
    assert pool.stats().huge_bytes == 0
    for obj in objs:
        obj.ref_down()
    pool.close()
    assert caplog.text.count("sysctl vm.nr_hugepages=28") == 1, "20 that others have, and 8 for us"
    assert "0 of 16 MiB" in caplog.text


def test_they_can_be_left_to_others(caplog) -> None:
    free = free_huge_pages()
    pool = SlabAllocator(4 * MIB, pin_memory=False, shared=SharedMemorySource(huge_pages=False))
    with caplog.at_level(logging.INFO), pool.allocate(spec(MIB)):
        assert (pool.stats().huge_bytes, free_huge_pages()) == (0, free)
    pool.close()
    assert caplog.text == ""


def test_each_slab_decides_by_itself(monkeypatch) -> None:
    need_huge_pages(4)
    fallocate, refused = os.posix_fallocate, []

    def refuse_the_second(descriptor: int, offset: int, nbytes: int) -> None:
        refused.append(nbytes)
        if len(refused) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", refuse_the_second)
    pool = SlabAllocator(3 * HUGE_PAGE, slab_bytes=HUGE_PAGE, pin_memory=False, shared=SharedMemorySource())
    objs = [pool.allocate(spec(HUGE_PAGE)) for _ in range(3)]
    for number, obj in enumerate(objs):
        obj.bytes.fill_(number)
    assert pool.stats().huge_bytes == 2 * HUGE_PAGE
    for obj in objs:
        obj.ref_down()
    pool.close()


@pytest.mark.parametrize("capacity", [4096, 5 * MIB, 7 * MIB + 4096, 16 * MIB])
def test_a_shared_pool_is_cut_into_whole_huge_pages(capacity: int) -> None:
    pool = SlabAllocator(capacity, slab_bytes=3 * MIB, pin_memory=False, shared=SharedMemorySource())
    assert pool.capacity_bytes == (capacity if capacity < HUGE_PAGE else capacity // HUGE_PAGE * HUGE_PAGE)
    objs = []
    while (obj := pool.allocate(spec(min(MIB, capacity)))) is not None:
        obj.bytes.fill_(len(objs))
        [(slab, _)] = pool.places_of([obj])
        descriptor, nbytes = pool.descriptor_of(slab)
        os.close(descriptor)
        assert nbytes % min(HUGE_PAGE, capacity) == 0
        objs.append(obj)
    assert pool.used_bytes == pool.stats().reserved_bytes == pool.capacity_bytes
    for obj in objs:
        obj.ref_down()
    pool.close()


def test_an_object_larger_than_the_slabs_gets_whole_huge_pages_too() -> None:
    pool = SlabAllocator(12 * MIB, slab_bytes=4 * MIB, pin_memory=False, shared=SharedMemorySource())
    with pool.allocate(spec(7 * MIB)):
        assert pool.stats().reserved_bytes == 8 * MIB
    pool.close()


def test_what_was_made_ahead_goes_back_when_it_is_not_wanted() -> None:
    need_huge_pages(3)
    before, free = open_descriptors(), free_huge_pages()
    source = SharedMemorySource()
    source.prepare(2 * HUGE_PAGE)
    memory = source.take(HUGE_PAGE)
    assert (memory.nbytes, memory.huge) == (HUGE_PAGE, True)
    os.close(memory.descriptor)
    source.prepare(HUGE_PAGE)
    source.close()
    source.close()
    assert eventually(lambda: (open_descriptors(), free_huge_pages()) == (before, free))


def test_who_waits_for_memory_waits_a_moment_at_most(monkeypatch, caplog) -> None:
    """Half a gigabyte can take a second, and that is how long a client waits for an answer."""
    need_huge_pages(1)
    before, fallocate, go = open_descriptors(), os.posix_fallocate, threading.Event()

    def slow(descriptor: int, offset: int, nbytes: int) -> None:
        go.wait(10)
        fallocate(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", slow)
    monkeypatch.setattr(shared_memory, "_PATIENCE", 0.01)
    pool = SlabAllocator(2 * HUGE_PAGE, slab_bytes=HUGE_PAGE, pin_memory=False, shared=SharedMemorySource())
    with caplog.at_level(logging.INFO), pool.allocate(spec(HUGE_PAGE)):
        assert pool.stats().huge_bytes == 0
        go.set()
        monkeypatch.setattr(shared_memory, "_PATIENCE", 10)
        with pool.allocate(spec(HUGE_PAGE)):
            assert pool.stats().huge_bytes == HUGE_PAGE, "it was ready by then"
    pool.close()
    assert caplog.text == "", "nothing is lacking"
    assert eventually(lambda: open_descriptors() == before)


def test_the_next_piece_is_made_ahead() -> None:
    """Clearing huge pages takes longer than a client waits for its answer."""
    need_huge_pages(1)
    source = SharedMemorySource()
    source.prepare(HUGE_PAGE)
    wait_for_what_is_made_ahead()
    free = free_huge_pages()
    memory = source.take(HUGE_PAGE)
    assert memory.huge
    assert free_huge_pages() == free, "it was there"
    os.close(memory.descriptor)


def test_a_piece_that_could_not_be_made_is_tried_again(monkeypatch) -> None:
    create = os.memfd_create
    left = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))] * 2

    def fail_at_first(name: str, flags: int) -> int:
        if left:
            raise left.pop()
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", fail_at_first)
    source = SharedMemorySource()
    source.prepare(HUGE_PAGE)
    with pytest.raises(OSError, match="Too many open files"):
        source.take(HUGE_PAGE)
    os.close(source.take(HUGE_PAGE).descriptor)
