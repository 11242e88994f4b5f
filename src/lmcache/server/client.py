"""``ServerClient``: attached to the server whenever there is one."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path

from lmcache.observability.logging import init_logger, log_limited
from lmcache.observability.metrics import Metrics
from lmcache.server import protocol as p
from lmcache.server.attachment import Attachment

logger = init_logger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


class ServerClient:
    """Attaches anew, in the background, when the server was lost. Thread-safe; no method raises."""

    def __init__(
        self,
        path: Path,
        timeout: float,
        metrics: Metrics,
        on_passages: Callable[[p.Rows, bool], None] = lambda rows, complete: None,
    ) -> None:
        """Waits ``timeout`` seconds at most for a server to attach to; goes on without.

        Args:
            on_passages: told what others know of passages, after :meth:`subscribe`.
        """
        self.path = path
        self._timeout = timeout
        self._metrics = metrics
        self._on_passages = on_passages
        self._closed = threading.Event()
        self._attachment: Attachment | None = None
        self._subscribed = False
        self._was_attached = False
        self._attach()
        self._keeper = threading.Thread(target=self._keep_attached, name="lmcache-attach", daemon=True)
        self._keeper.start()

    @property
    def attachment(self) -> Attachment | None:
        """None while there is no server."""
        attachment = self._attachment
        return None if attachment is None or attachment.lost.is_set() else attachment

    def subscribe(self, on_passages: Callable[[p.Rows, bool], None]) -> None:
        """Have ``on_passages`` told all passages that are known, at every attachment, and new ones as they come."""
        self._on_passages = on_passages
        self._subscribed = True
        if (attachment := self.attachment) is not None:
            attachment.send(p.Subscribe())

    def failed(self, what: str, error: Exception) -> None:
        """Count what became a miss."""
        self._metrics.failure(f"server_{what}")
        log_limited(
            logger, logging.WARNING, f"server:{type(error).__name__}",
            "the cache server at %s: %s failed and counts as a miss: %s", self.path, what, error,
        )  # fmt: skip

    def close(self) -> None:
        """Let go. Objects that are still held stay valid. Idempotent."""
        self._closed.set()
        self._let_go()  # which wakes the thread
        self._keeper.join(5.0)
        self._let_go()  # it may have attached meanwhile

    def _let_go(self) -> None:
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.lose()

    def _keep_attached(self) -> None:
        pause = _FIRST_PAUSE
        while not self._closed.is_set():
            attachment = self._attachment
            if attachment is not None and not attachment.lost.is_set():
                attachment.lost.wait(0.5)
                continue
            if attachment is not None and self._was_attached:
                self._was_attached = False
                self._metrics.failure("server_lost")
                logger.warning("the cache server at %s is gone; until it comes back nothing is reused", self.path)
            if self._attach():
                pause = _FIRST_PAUSE
            else:
                self._closed.wait(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _attach(self) -> bool:
        try:
            attachment = Attachment(self.path, self._timeout, lambda *said: self._on_passages(*said))
        except (OSError, ValueError) as error:
            log_limited(
                logger, logging.WARNING, f"server:attach:{type(error).__name__}",
                "no cache server at %s (%s: %s); going on without until there is one",
                self.path, type(error).__name__, error,
            )  # fmt: skip
            return False
        self._attachment = attachment
        self._was_attached = True
        if self._subscribed:
            attachment.send(p.Subscribe())
        logger.info("attached to the cache server at %s", self.path)
        return True
