"""Connections of the official Redis client, lent out one at a time, each within a deadline."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lmcache.storage.remote.redis_wire import RedisWire


class RedisConnections:
    """At most ``limit`` to one server. The client's own pools keep the timeouts that a connection was made with, also
    for connecting it anew; here every use has its own. Thread-safe."""

    def __init__(self, kind: type[Any], settings: Mapping[str, Any], limit: int) -> None:
        """``kind`` of connection, and what it is made with."""
        self._kind = kind
        self._settings = dict(settings)
        self._free = threading.Semaphore(limit)
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        self._closed = False

    @contextmanager
    def use(self, deadline: float) -> Iterator[RedisWire]:
        """A connection until ``deadline`` (of ``time.monotonic``). It is kept if it was left at the end of a reply, and
        closed otherwise."""
        if not self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError("all connections were in use")
        try:
            connection = self._idle_connection() or self._connect(deadline)
            wire = RedisWire(connection._sock, deadline)
            try:
                yield wire
            finally:
                with self._lock:
                    keep = wire.is_clean and not self._closed
                    if keep:
                        self._idle.append(connection)
                if not keep:
                    connection.disconnect()
        finally:
            self._free.release()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.disconnect()

    def _idle_connection(self) -> Any | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            sock = connection._sock
            # The server speaks unasked only to say that it is gone.
            if sock is not None and not select.select([sock], [], [], 0)[0]:
                return connection
            connection.disconnect()

    def _connect(self, deadline: float) -> Any:
        left = max(0.001, deadline - time.monotonic())
        connection = self._kind(**{**self._settings, "socket_timeout": left, "socket_connect_timeout": left})
        try:
            connection.connect()
        except BaseException:
            connection.disconnect()
            raise
        return connection
