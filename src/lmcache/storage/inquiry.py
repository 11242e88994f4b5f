"""``Inquiry``: a question to slow tiers that is under way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait


class Inquiry:
    """Done when every tier that was asked has answered or given up. Thread-safe."""

    def __init__(self, asked: Sequence[Future[None]] = ()) -> None:
        """``asked``: none of them raises."""
        self._asked = asked

    def ready(self) -> bool:
        """Never blocks."""
        return all(answer.done() for answer in self._asked)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`ready`; False when ``timeout`` seconds were not enough."""
        return not wait(self._asked, timeout).not_done if self._asked else True
