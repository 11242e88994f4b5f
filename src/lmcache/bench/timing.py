"""The stopwatch that all benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lmcache.bench.rows import Spread


@dataclass(frozen=True)
class Work:
    """``run`` is timed; ``before`` puts things in order for it and is not. What ``run`` returns is freed untimed."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    kept = work()
    taken = time.perf_counter() - start
    del kept
    return taken


def take_turns(works: Mapping[str, Work], runs: int) -> dict[str, list[float]]:
    """Seconds of every run of every work, by its name.

    The works of a run follow each other directly, forwards and backwards in turn, so that a noisy machine disturbs all
    of them alike and figures of one run can be compared. One run ahead of these, not counted, warms everything up.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    order = list(works.items())
    for number in range(-1, runs):
        for name, work in order:
            work.before()
            once = seconds(work.run)
            if number >= 0:
                taken[name].append(once)
        order.reverse()
    return taken


def median(figures: Sequence[float]) -> float:
    return statistics.median(figures)


def share(ours: Sequence[float], raw: Sequence[float]) -> Spread:
    """Our speed over the raw speed, from the seconds of runs that took turns."""
    shares = [theirs / mine for mine, theirs in zip(ours, raw, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4, method="inclusive") if len(shares) > 1 else shares * 3
    return Spread(middle, low, high)
