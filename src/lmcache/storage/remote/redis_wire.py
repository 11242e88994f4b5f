"""Redis commands and replies on a connection of the official client, without copies of large values.

The client connects, authenticates and keeps the connections. Its parser makes a bytes object of every value, so
between two uses of a connection we speak on its socket ourselves (RESP 2, https://redis.io/docs/reference/protocol-spec).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeAlias

from lmcache.storage.remote.interface import Receiver, RemoteStoreError

Argument: TypeAlias = "bytes | tuple[memoryview, ...]"
"""Of a command; a tuple is one argument that lies in parts."""

_BUFFER_BYTES = 1 << 16
_MAX_LINE = 1 << 14
# Errors of one command on a server that is well otherwise.
_NOT_OUTAGES = {"oom", "misconf", "readonly"}


class RedisReplyError(RemoteStoreError):
    """The server answered with an error: the connection can go on."""

    def __init__(self, line: str) -> None:
        word = line.partition(" ")[0].lower()
        super().__init__("full" if word == "oom" else word, line, is_outage=word not in _NOT_OUTAGES)
        self.line = line


class RedisWire:
    """One use of a connection, until ``deadline`` (of ``time.monotonic``). Raises what sockets raise, and
    :class:`RedisReplyError`. It must end where a reply ends; :attr:`is_clean` says so."""

    def __init__(self, sock: Any, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self._due = 0

    @property
    def is_clean(self) -> bool:
        """Whether every reply was read, and nothing else came."""
        return self._due == 0 and self._start == self._end

    def send(self, commands: Sequence[Sequence[Argument]]) -> None:
        """Each is answered by one reply, in this order."""
        pending = bytearray()
        for command in commands:
            pending += b"*%d\r\n" % len(command)
            for argument in command:
                parts = argument if isinstance(argument, tuple) else (memoryview(argument),)
                pending += b"$%d\r\n" % sum(part.nbytes for part in parts)
                for part in parts:
                    if part.nbytes < _BUFFER_BYTES:
                        pending += part
                        continue
                    self._send(memoryview(pending))
                    self._send(part)
                    pending = bytearray()
                pending += b"\r\n"
            self._due += 1
        self._send(memoryview(pending))

    def reply(self) -> int | bytes | None:
        """An integer or a short string; None for nothing."""
        kind, rest = self._line()
        if kind == b"-":
            self._due -= 1
            raise RedisReplyError(rest.decode(errors="replace"))
        if kind == b"+":
            said: int | bytes | None = rest
        elif kind == b":":
            said = int(rest)
        elif kind == b"$" and rest == b"-1":
            said = None
        else:
            raise ConnectionError(f"unexpected reply {kind + rest[:40]!r}")
        # Only now: what makes no sense leaves the connection unclean.
        self._due -= 1
        return said

    def value(self, receiver: Receiver) -> bool:
        """The reply to GET, taken in by ``receiver``; False where there is no value."""
        kind, rest = self._line()
        if kind == b"-":
            self._due -= 1
            raise RedisReplyError(rest.decode(errors="replace"))
        if kind != b"$":
            raise ConnectionError(f"unexpected reply {kind + rest[:40]!r}")
        nbytes = int(rest)
        if nbytes < 0:
            self._due -= 1
            return False
        head = memoryview(bytearray(min(nbytes, receiver.head_bytes)))
        self._fill(head)
        memory = receiver.begin(nbytes, head)
        if memory is None:
            self._skip(nbytes - len(head))
        else:
            self._fill(memory.cast("B"))
        self._skip(2)
        self._due -= 1
        if memory is not None:
            receiver.finish()
        return True

    def _line(self) -> tuple[bytes, bytes]:
        """The kind of reply, and what stands behind it up to the end of the line."""
        line = bytearray()
        while not line.endswith(b"\r\n"):
            if self._start == self._end:
                self._receive()
            data = bytes(self._buffer[self._start : self._end])
            at = data.find(b"\n")
            taken = len(data) if at < 0 else at + 1
            line += data[:taken]
            self._start += taken
            if len(line) > _MAX_LINE:
                raise ConnectionError("a reply has no end")
        return bytes(line[:1]), bytes(line[1:-2])

    def _fill(self, memory: memoryview) -> None:
        done = min(len(memory), self._end - self._start)
        memory[:done] = self._buffer[self._start : self._start + done]
        self._start += done
        while done < len(memory):
            self._set_timeout()
            count = self._sock.recv_into(memory[done:])
            if count == 0:
                raise ConnectionError("the server closed the connection in the middle of a value")
            done += count

    def _skip(self, nbytes: int) -> None:
        while nbytes:
            if self._start == self._end:
                self._receive()
            taken = min(nbytes, self._end - self._start)
            self._start += taken
            nbytes -= taken

    def _receive(self) -> None:
        self._set_timeout()
        count = self._sock.recv_into(self._buffer)
        if count == 0:
            raise ConnectionError("the server closed the connection")
        self._start, self._end = 0, count

    def _send(self, data: memoryview) -> None:
        # In slices, so that the deadline counts for the whole and not for each piece that gets through.
        for start in range(0, data.nbytes, 1 << 22):
            self._set_timeout()
            self._sock.sendall(data.cast("B")[start : start + (1 << 22)])

    def _set_timeout(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        self._sock.settimeout(left)
