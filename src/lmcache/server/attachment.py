"""``Attachment``: a client's connection to one run of the server, and what it holds there."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.observability.logging import init_logger
from lmcache.server import protocol as p
from lmcache.server.mapped_slabs import MappedSlabs
from lmcache.server.outbox import Outbox
from lmcache.sockets.frames import ConnectionLostError, receive_descriptor, receive_frame, send_frame
from lmcache.sockets.local import is_same_user

logger = init_logger(__name__)


_GATHER_SECONDS = 0.001


class LostError(ConnectionError):
    """The server does not answer, or not in time."""


class Attachment:
    """Never used again once it is lost: a new one is made. What was read through it stays valid memory until it is
    released, and the server, if it is still there, keeps it for us until then. Thread-safe."""

    def __init__(self, path: Path, timeout: float, on_passages: Callable[[p.Rows, bool], None]) -> None:
        """Args:
        timeout: seconds that the server may take for an answer.
        on_passages: told what others know, in a thread of ours.

        Raises:
            OSError, ValueError: there is no server, or it does not serve us.
        """
        self._timeout = timeout
        self._on_passages = on_passages
        self._events = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._calls: socket.socket | None = None
        try:
            self._events.settimeout(timeout)
            self._events.connect(str(path))
            if not is_same_user(self._events) and os.getuid() != 0:
                logger.info("the cache server at %s belongs to another user", path)
            send_frame(self._events, p.encode(p.Hello(p.PROTOCOL, os.getpid())))
            raw, descriptor = receive_descriptor(self._events)
            if descriptor is not None:
                self._calls = socket.socket(fileno=descriptor)
            welcome = p.from_server.decode(raw)
            if not isinstance(welcome, p.Welcome) or self._calls is None:
                raise ConnectionLostError(welcome.reason if isinstance(welcome, p.Goodbye) else "no welcome")
            self.welcome = welcome
            self._calls.settimeout(timeout)
            self._events.settimeout(None)
        except BaseException:
            self._events.close()
            if self._calls is not None:
                self._calls.close()
            raise
        self._call_lock = threading.Lock()
        self._lock = threading.Lock()
        self._next_ticket = 0
        # Most of what is expected is there at once, so a future is made when somebody asks for it; early ones have
        # ended before.
        self._reads: dict[int, Future[MemoryObj | None] | None] = {}
        self._early: dict[int, Future[MemoryObj | None]] = {}
        self._asked: dict[int, Future[None]] = {}
        self._live: dict[int, MemoryObj] = {}
        self._released: list[int] = []
        self._count_lock = threading.Lock()
        self.lost = threading.Event()
        self._slabs = MappedSlabs(self._fetch_slab)
        self._outbox = Outbox(self._events, "lmcache-client-events")
        threading.Thread(target=self._listen, name="lmcache-client", daemon=True).start()

    def call(self, message: p.Call, timeout: float | None = None) -> p.Reply:
        """Raises:
        LostError: no answer in time. Nothing can be asked here any more, unless others were in the way.
        ValueError: the server has refused.
        """
        reply, _ = self._call(message, timeout or self._timeout)
        return reply

    def send(self, message: p.FromClient) -> None:
        """Without an answer, and without waiting."""
        self._outbox.put(p.encode(message))

    def tickets(self, number: int) -> range:
        """So many numbers that were not used before."""
        with self._lock:
            first, self._next_ticket = self._next_ticket, self._next_ticket + number
        return range(first, first + number)

    def expect_reads(self, tickets: Sequence[int]) -> None:
        """Reads may begin with the next call, whose answer their ends can overtake. Each ticket then goes to
        :meth:`read` or to :meth:`forget_reads`."""
        with self._lock:
            self._reads.update(dict.fromkeys(tickets))

    def read(self, ticket: int) -> Future[MemoryObj | None]:
        """What an expected read gives: None if the server is lost before its end."""
        with self._lock:
            if (future := self._early.pop(ticket, None)) is None:
                future = _running()
                if ticket in self._reads:
                    self._reads[ticket] = future
                else:  # given up when the server was lost
                    future.set_result(None)
        return future

    def forget_reads(self, tickets: Sequence[int]) -> None:
        with self._lock:
            early = [self._early.pop(ticket, None) for ticket in tickets]
            for ticket in tickets:
                self._reads.pop(ticket, None)
        for future in early:
            if future is not None:
                future.add_done_callback(_release_result)

    def expect_answer(self, ticket: int) -> Future[None]:
        future: Future[None] = Future()
        with self._lock:
            self._asked[ticket] = future
        return future

    def open(self, place: p.Place, specs: Sequence[KVSpec]) -> MemoryObj | None:
        """The chunk at ``place`` with one reference; None when it cannot be mapped, or the server was lost."""
        try:
            spec = specs[place.spec]
            buffer = self._slabs.view(place.slab, place.offset, spec.nbytes)
        except (OSError, ValueError, IndexError) as error:
            logger.warning("a chunk of the cache server cannot be mapped: %r", error)
            self.send(p.Release([place.handle]))
            return None
        obj = MemoryObj(spec, buffer, place.handle, self._release, self._count_lock)
        with self._lock:
            # Once lost the server may have given it back already, and somebody else be writing there.
            if self.lost.is_set():
                return None
            self._live[place.handle] = obj
        return obj

    def owns(self, obj: MemoryObj) -> bool:
        """Whether ``obj`` came from :meth:`open` and was not given back."""
        return self._live.get(obj.offset) is obj

    def lose(self) -> None:
        """Ask nothing more; give everything back as soon as the last object is released. Idempotent."""
        with self._lock:
            if self.lost.is_set():
                return
            self.lost.set()
            reads, self._reads = self._reads, {}
            asked, self._asked = self._asked, {}
            idle = not self._live
        assert self._calls is not None
        with suppress(OSError):
            self._calls.shutdown(socket.SHUT_RDWR)
        for read in reads.values():
            if read is not None:
                read.set_result(None)
        for answer in asked.values():
            answer.set_result(None)
        if idle:
            self._part()

    def _call(self, message: p.Call, timeout: float) -> tuple[p.Reply, int | None]:
        deadline = time.monotonic() + timeout
        calls = self._calls
        assert calls is not None
        # Whoever waits for another's long call has lost nothing but patience.
        if not self._call_lock.acquire(timeout=timeout):
            raise LostError("the server is busy with another request of this process")
        try:
            if self.lost.is_set():
                raise LostError("the server is gone")
            calls.settimeout(max(0.001, deadline - time.monotonic()))
            send_frame(calls, p.encode(message))
            raw, descriptor = (
                receive_descriptor(calls) if isinstance(message, p.MapSlab) else (receive_frame(calls), None)
            )
            reply = p.replies.decode(raw)
        except (OSError, ValueError) as error:
            if not isinstance(error, LostError):
                self.lose()
            raise LostError(f"{type(message).__name__}: {type(error).__name__}: {error}") from error
        finally:
            self._call_lock.release()
        if isinstance(reply, p.Refused):
            raise ValueError(reply.reason)
        return reply, descriptor

    def _fetch_slab(self, number: int) -> tuple[int, int]:
        reply, descriptor = self._call(p.MapSlab(number), self._timeout)
        if descriptor is None or not isinstance(reply, p.Number):
            raise ValueError(f"no memory came with slab {number}")
        return descriptor, reply.number

    def _listen(self) -> None:
        try:
            while True:
                event = p.from_server.decode(receive_frame(self._events))
                if isinstance(event, p.Arrived):
                    self._arrived(event)
                elif isinstance(event, p.Answered):
                    with self._lock:
                        answer = self._asked.pop(event.ticket, None)
                    if answer is not None:
                        answer.set_result(None)
                elif isinstance(event, p.Passages):
                    self._on_passages(event.rows, event.complete)
        except Exception as error:
            logger.debug("the connection to the cache server has ended: %r", error)
        finally:
            self.lose()

    def _arrived(self, event: p.Arrived) -> None:
        with self._lock:
            expected = event.ticket in self._reads
            future = self._reads.pop(event.ticket, None)
            if expected and future is None:
                future = self._early[event.ticket] = _running()
        if future is None:  # its call has failed meanwhile
            if event.place is not None:
                self.send(p.Release([event.place.handle]))
            return
        obj = None
        try:
            if event.place is not None:
                obj = self.open(event.place, p.decode_specs(event.specs))
        finally:
            future.set_result(obj)

    def _release(self, obj: MemoryObj) -> None:
        with self._lock:
            self._live.pop(obj.offset, None)
            over = self.lost.is_set() and not self._live
            self._released.append(obj.offset)
            first = len(self._released) == 1
        if first:
            self._outbox.put(self._released_so_far)
        if over:
            self._part()

    def _released_so_far(self) -> bytes:
        """What a retrieve lets go of chunk by chunk, in one message."""
        time.sleep(_GATHER_SECONDS)  # to send at once would take turns with the thread that lets go
        with self._lock:
            handles, self._released = self._released, []
        return p.encode(p.Release(handles))

    def _part(self) -> None:
        """The end of the session: the server gives everything back."""
        self._outbox.close()
        with suppress(OSError):
            self._events.shutdown(socket.SHUT_RDWR)
        self._events.close()
        assert self._calls is not None
        self._calls.close()
        self._slabs.close()


def _running() -> Future[MemoryObj | None]:
    future: Future[MemoryObj | None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _release_result(read: Future[MemoryObj | None]) -> None:
    if (obj := read.result()) is not None:
        obj.ref_down()
