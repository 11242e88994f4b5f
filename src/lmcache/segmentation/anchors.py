"""Anchors: places in a row of tokens that are found again wherever the same tokens stand.

A window of :data:`WINDOW` tokens is an anchor when its hash happens to be divisible by :data:`DENSITY`. That depends on
nothing but these tokens, so a passage has the same anchors in every prompt, however the prompt is cut into chunks
(content-defined chunking, as in LBFS, Muthitacharoen et al. 2001).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

WINDOW = 32
DENSITY = 32  # a power of two

# Any odd number with well-mixed bits: a polynomial in it, modulo 2^64, hashes a window in constant time.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


def anchors(
    tokens: npt.NDArray[np.uint32], also: Collection[int] = ()
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Where the anchors of ``tokens`` begin, ascending, and the hashes of their windows.

    Args:
        also: places whose windows count as anchors whatever their hashes; those without a whole window do not count.
    """
    count = len(tokens) - WINDOW + 1
    if count < 1:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    hashes, chosen = _windows(tokens)
    if also:
        chosen[[place for place in also if 0 <= place < count]] = True
    starts = np.flatnonzero(chosen)
    return starts, hashes[starts]


def anchors_of_each(
    rows: Sequence[npt.NDArray[np.uint32]], also: Sequence[Collection[int]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """:func:`anchors` of each of ``rows``, all at once: which row, where in it, and the hash; in that order.

    Args:
        rows: at least one, each of at least :data:`WINDOW` tokens.
        also: of each row.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ends = np.cumsum(lengths)
    begins = ends - lengths
    hashes, chosen = _windows(np.concatenate(rows))
    # A window of two rows is none of either.
    chosen[(begins[1:, None] - np.arange(1, WINDOW)).ravel()] = False
    chosen[
        [
            begin + place
            for begin, length, places in zip(begins.tolist(), lengths.tolist(), also, strict=True)
            for place in places
            if 0 <= place <= length - WINDOW
        ]
    ] = True
    starts = np.flatnonzero(chosen)
    of = np.searchsorted(ends, starts, side="right")
    return of, starts - begins[of], hashes[starts]


def _windows(tokens: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """The hash of each window of ``tokens``, and whether that makes it an anchor."""
    count = len(tokens) - WINDOW + 1
    powers, inverses = _powers(_rounded_up(len(tokens)))
    # sums[i] = Σ_{j<i} (t_j + 1)·B^j, so a window's share of it, shifted back by B^-i, depends on its tokens alone.
    # In place throughout: memory that the system must clear first takes longer than the sums.
    sums = np.empty(len(tokens) + 1, np.uint64)
    sums[0] = 0
    terms = sums[1:]
    np.add(tokens, np.uint64(1), out=terms, dtype=np.uint64)
    terms *= powers[: len(tokens)]
    np.cumsum(terms, out=terms)
    hashes = sums[WINDOW:] - sums[:-WINDOW]
    hashes *= inverses[:count]
    halves = sums[:count]
    np.right_shift(hashes, _HALF, out=halves)
    hashes ^= halves
    hashes *= _MIX
    np.right_shift(hashes, _HALF, out=halves)
    hashes ^= halves
    np.bitwise_and(hashes, np.uint64(DENSITY - 1), out=halves)
    return hashes, halves == 0


def _rounded_up(length: int) -> int:
    return 1 << max(12, (length - 1).bit_length())


@lru_cache(maxsize=8)
def _powers(length: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """B^i and B^-i for i < ``length``, modulo 2^64."""
    columns = []
    for base in (_BASE, _INVERSE):
        steps = np.full(length, base, np.uint64)
        steps[0] = 1
        columns.append(np.cumprod(steps))
    return columns[0], columns[1]
