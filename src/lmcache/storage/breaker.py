"""Stops trying for a while what failed several times in a row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """After ``threshold`` consecutive failures: closed for ``cooldown`` seconds, twice as long for each further one.

    When the time is up, attempts are allowed again; the next success makes everything normal. Thread-safe.
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
        return self._clock() >= self._resume_at

    def succeeded(self) -> None:
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            # Beyond 30 doublings every sensible maximum is reached; the cap keeps the power small.
            excess = min(self._failures - self._threshold, 30)
            if excess >= 0:
                self._resume_at = self._clock() + min(self._cooldown * 2**excess, self._max_cooldown)
