"""The network between servers and their Redis, which can be cut and can stall."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType

from typing_extensions import Self

from demo.fleet.redis_server import free_port


class RedisLink:
    """``with RedisLink(port) as link:`` leads from ``link.port`` of this machine to ``port`` of ``host``."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = free_port()
        self._target = host, port
        self._listener: socket.socket | None = None
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def cut(self) -> None:
        """Every connection ends, and no new one is taken."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            ends = list(self._open)
        for end in ends:
            _shut(end)

    def mend(self) -> None:
        listener = self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def stall(self) -> None:
        """Connections stay, and nothing gets through until :meth:`flow`."""
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(self._target, timeout=5)
            except OSError:
                if self._listener is not listener:
                    return
                continue  # Redis is away
            with self._lock:
                self._open |= {near, far}
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            source.settimeout(None)
            while data := source.recv(1 << 18):
                self._flows.wait()
                target.sendall(data)
        for end in (source, target):
            _shut(end)
        with self._lock:
            self._open -= {source, target}

    def __enter__(self) -> Self:
        self.mend()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flow()
        self.cut()


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    time.sleep(0)
    end.close()
