"""Which neighbours have to go so that a large object fits: the cheapest run of pieces that leaves a hole."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Removing ``starts`` leaves a hole of the size that was asked for; they hold ``cost`` granules."""

    cost: int
    starts: list[int]


def cheapest_window(
    pieces: Sequence[tuple[int, int]], base: int, end: int, size: int, removable: Container[int]
) -> Window | None:
    """The run of neighbouring pieces with the fewest granules whose removal leaves ``size`` free ones in a row.

    Args:
        pieces: ``(start, size)`` of everything that lies in ``[base, end)``, in address order.
        removable: starts of the pieces that may go.

    Returns:
        None when no run of removable pieces makes a hole that is large enough. O(pieces).
    """
    best: tuple[int, int, int] | None = None
    first = 0  # the window holds pieces[first:last] and reaches from hole_start to the next piece
    hole_start = base
    cost = 0
    for last in range(len(pieces) + 1):
        hole_end = pieces[last][0] if last < len(pieces) else end
        while hole_end - hole_start >= size:
            if best is None or cost < best[0]:
                best = (cost, first, last)
            if first == last:
                break
            start, length = pieces[first]
            hole_start = start + length
            cost -= length
            first += 1
        if last == len(pieces):
            break
        start, length = pieces[last]
        if start in removable:
            cost += length
        else:
            first, hole_start, cost = last + 1, start + length, 0
    if best is None:
        return None
    return Window(best[0], [start for start, _ in pieces[best[1] : best[2]]])
