"""The core that a timed thread runs on.

On a shared host a core can be half as fast as the next one, and another one a second later: whoever computes beside it
is not to be seen. What one thread of Python does for a request would then tell more about neighbours than about vLLM.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ROUNDS, _TRIES = 10_000, 2
_STILL_FAST = 1.15

_last: int | None = None
_fastest = float("inf")


@contextmanager
def fast_core() -> Iterator[float]:
    """Bind this thread, and no other for longer than this lasts, to the core that is fastest now.

    Yields:
        milliseconds that a small loop takes there.
    """
    global _last, _fastest
    everywhere = os.sched_getaffinity(0)
    thread = threading.get_native_id()
    speed = 0.0 if _last is None else _speed(thread, _last)
    if _last is None or speed > _STILL_FAST * _fastest:
        speeds = {core: _speed(thread, core) for core in sorted(everywhere)}
        _last = min(speeds, key=lambda core: speeds[core])
        speed = speeds[_last]
        _fastest = min(_fastest, speed)
        os.sched_setaffinity(thread, {_last})
    try:
        yield speed
    finally:
        # A thread that was started meanwhile has taken the binding over.
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                os.sched_setaffinity(int(task.name), everywhere)


def _speed(thread: int, core: int) -> float:
    os.sched_setaffinity(thread, {core})
    return min(_loop_milliseconds() for _ in range(_TRIES))


def _loop_milliseconds() -> float:
    start, total = time.perf_counter(), 0
    for number in range(_ROUNDS):
        total += number * number
    return (time.perf_counter() - start) * 1e3
