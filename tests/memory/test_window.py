from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache.memory.window import cheapest_window

END = 40


def brute_force(pieces: list[tuple[int, int]], size: int, removable: set[int]) -> int | None:
    """Fewest granules that have to go, over every place where the hole could lie."""
    costs = []
    for start in range(END - size + 1):
        hit = [(at, length) for at, length in pieces if at < start + size and start < at + length]
        if all(at in removable for at, _ in hit):
            costs.append(sum(length for _, length in hit))
    return min(costs, default=None)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=12),
    st.integers(1, END),
)
def test_as_good_as_trying_every_place(layout: list[tuple[int, int, bool]], size: int) -> None:
    pieces, removable, at = [], set(), 0
    for gap, length, may_go in layout:
        if at + gap + length > END:
            break
        at += gap
        pieces.append((at, length))
        if may_go:
            removable.add(at)
        at += length
    window = cheapest_window(pieces, 0, END, size, removable)
    expected = brute_force(pieces, size, removable)
    if window is None:
        assert expected is None
        return
    assert window.cost == expected
    assert set(window.starts) <= removable
    left = [piece for piece in pieces if piece[0] not in window.starts]
    assert brute_force(left, size, set()) == 0
