from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache.memory.free_space import FreeSpace

SIZE = 64


def make(size: int = SIZE) -> FreeSpace:
    space = FreeSpace()
    space.give(0, size)
    return space


def test_the_lowest_address_comes_first() -> None:
    space = make()
    assert [space.take(8) for _ in range(8)] == list(range(0, 64, 8))
    assert space.take(1) is None


def test_the_smallest_hole_that_fits_is_used() -> None:
    space = make()
    for size in (10, 1, 4, 1, 6):
        space.take(size)
    space.give(0, 10)
    space.give(11, 4)
    assert space.take(3) == 11
    assert space.take(9) == 0


def test_neighbours_merge_on_both_sides() -> None:
    space = make(12)
    for _ in range(3):
        space.take(4)
    space.give(0, 4)
    space.give(8, 4)
    assert space.largest == 4
    space.give(4, 4)
    assert space.largest == 12
    assert space.is_free(0, 12)


def test_a_range_can_be_withdrawn() -> None:
    space = make()
    space.give(100, 8)
    assert space.is_free(100, 8)
    space.withdraw(100)
    assert space.largest == SIZE
    space.give(108, 4)
    assert space.take(5) == 0


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 100))))
def test_takes_never_overlap_and_everything_comes_back(steps: list[tuple[int, int]]) -> None:
    space = make()
    taken: list[tuple[int, int]] = []
    owner = [False] * SIZE
    for size, choice in steps:
        start = space.take(size)
        if start is None:
            run = best = 0
            for used in owner:
                run = 0 if used else run + 1
                best = max(best, run)
            assert best == space.largest < size, "a hole that was there was not found"
            if taken:
                start, size = taken.pop(choice % len(taken))
                owner[start : start + size] = [False] * size
                space.give(start, size)
        else:
            assert not any(owner[start : start + size])
            owner[start : start + size] = [True] * size
            taken.append((start, size))
    for start, size in taken:
        space.give(start, size)
    assert space.is_free(0, SIZE)
