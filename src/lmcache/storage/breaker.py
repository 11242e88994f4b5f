"""Stops trying for a while what failed several times in a row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """After ``threshold`` consecutive failures: open for ``cooldown`` seconds, twice as long for each further one.

    When the time is up it is half open: :meth:`attempt` lets one through, and the next when that one has succeeded or
    failed, or has been silent for a whole cooldown. A success makes everything normal. Thread-safe.
    """

    def __init__(
        self,
        *,
        threshold: int = 3,
        cooldown: float = 1.0,
        max_cooldown: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threshold = threshold
        self._cooldown = cooldown
        self._max_cooldown = max_cooldown
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._resume_at = float("-inf")

    def allows(self) -> bool:
        """Whether it is worth thinking of an attempt: not while it is open."""
        return self._clock() >= self._resume_at

    def attempt(self) -> bool:
        """Whether to try now; who tries says how it went. While it is half open that is one at a time."""
        with self._lock:
            if self._clock() < self._resume_at:
                return False
            if self._failures >= self._threshold:
                self._resume_at = self._clock() + self._pause()
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failures = 0
            self._resume_at = float("-inf")

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._failures >= self._threshold:
                self._resume_at = self._clock() + self._pause()

    def _pause(self) -> float:
        # Beyond 30 doublings every sensible maximum is reached; the cap keeps the power small.
        return min(self._cooldown * 2.0 ** min(self._failures - self._threshold, 30), self._max_cooldown)
