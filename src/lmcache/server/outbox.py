"""``Outbox``: frames that are sent in the background, so that nobody waits for who does not read them."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable

from lmcache.sockets.frames import send_frame


class Outbox:
    """One thread for one connection. What cannot be sent is dropped: the other side is gone then."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[bytes | Callable[[], bytes] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, payload: bytes | Callable[[], bytes]) -> None:
        """Never waits, and takes no lock: safe wherever a reference may go. A function is asked what to send when its
        turn has come."""
        self._queue.put(payload)

    def close(self) -> None:
        """What is queued is still sent. Idempotent."""
        self._queue.put(None)

    def _run(self) -> None:
        broken = False
        while (payload := self._queue.get()) is not None:
            if not broken:
                try:
                    send_frame(self._connection, payload if isinstance(payload, bytes) else payload())
                except OSError:
                    broken = True
