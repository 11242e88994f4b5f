"""``Inquiry``: a question to slow tiers that is under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait


class Inquiry:
    """Over when every tier that was asked has answered, or the time is up. Thread-safe."""

    def __init__(self, asked: Sequence[Future[None]] = (), timeout: float = 0.0) -> None:
        """``asked``: none of them raises. ``timeout`` in seconds from now."""
        self._asked = asked
        self._until = time.monotonic() + timeout

    def ready(self) -> bool:
        """Never blocks."""
        return all(answer.done() for answer in self._asked) or time.monotonic() >= self._until

    def when_over(self, call: Callable[[], None]) -> None:
        """Call ``call`` once every tier has answered, whether in time or not; at once where none was asked."""
        left = len(self._asked)
        if not left:
            call()
            return
        lock = threading.Lock()

        def answered(_: Future[None]) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                call()

        for each in self._asked:
            each.add_done_callback(answered)

    def wait(self) -> None:
        """Wait until :meth:`ready`."""
        if self._asked:
            wait(self._asked, max(0.0, self._until - time.monotonic()))
