"""``Session``: the server's side of one client."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from lmcache.memory.memory_obj import MemoryObj
from lmcache.observability.logging import init_logger, log_limited
from lmcache.server import protocol as p
from lmcache.server.holdings import Holdings
from lmcache.server.outbox import Outbox
from lmcache.sockets.frames import receive_frame, send_descriptor, send_frame
from lmcache.storage.spec_codec import decode_spec

if TYPE_CHECKING:
    from lmcache.server.server import CacheServer

logger = init_logger(__name__)

HELLO_SECONDS = 5.0


class Session:
    """Lasts as long as the client's connection: memory that the client may be reading or writing is never handed to
    anybody else before, whatever became of its calls. Two threads, one a connection."""

    def __init__(self, server: CacheServer, events: socket.socket) -> None:
        self._server = server
        self._storage = server.storage
        self._events = events
        self._calls: socket.socket | None = None
        self._outbox: Outbox | None = None
        self._tier_number = {name: number for number, name in enumerate(server.tiers)}
        self.holdings = Holdings(server.storage, server.memory)
        self._handlers: dict[type, Callable[[Any], p.Reply]] = {
            p.Find: self._find,
            p.Holds: lambda call: p.Flags(bytes(self._storage.holds(call.keys.decode()))),
            p.Ask: self._ask,
            p.Acquire: self._acquire,
            p.Allocate: self._allocate,
            p.Put: self._put,
            p.Renew: lambda call: p.Flags(bytes(map(self._storage.renew, call.keys.decode()))),
            p.Pin: lambda call: p.Number(self.holdings.pin(call.keys.decode())),
            p.Unpin: self._unpin,
            p.Clear: lambda call: p.Number(self._storage.clear()),
            p.Flush: lambda call: p.Flags(bytes([self._storage.flush(0.0)])),
            p.Stats: lambda call: p.TierCounts(self._storage.stats()),
        }

    def run(self) -> None:
        """Serve until the client goes away."""
        try:
            if self._greet():
                self._listen()
        except OSError as error:
            logger.debug("a client is gone: %r", error)
        except ValueError as error:
            log_limited(logger, logging.WARNING, "server:client", "a client talks nonsense and is not heard: %r", error)
        finally:
            self._wait_for_the_end()
            self._server.passages.unsubscribe(self)
            self.holdings.end()
            self.hang_up()
            if self._outbox is not None:
                self._outbox.close()
            self._events.close()

    def hang_up(self) -> None:
        """Answer no more. What the client holds stays its own until it has closed its connection. Idempotent."""
        if self._calls is not None:
            _shut(self._calls)

    def disconnect(self) -> None:
        """End everything from another thread."""
        self.hang_up()
        _shut(self._events)

    def _greet(self) -> bool:
        self._events.settimeout(HELLO_SECONDS)
        hello = p.from_client.decode(receive_frame(self._events))
        if not isinstance(hello, p.Hello) or hello.protocol != p.PROTOCOL:
            reason = f"this server speaks version {p.PROTOCOL} of the protocol"
            send_frame(self._events, p.encode(p.Goodbye(reason)))
            return False
        self._calls, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            server = self._server
            welcome = p.Welcome(p.PROTOCOL, server.generation, server.asks, list(server.tiers))
            send_descriptor(self._events, p.encode(welcome), theirs.fileno())
        self._events.settimeout(None)
        self._outbox = Outbox(self._events, "lmcache-server-events")
        threading.Thread(target=self._answer_calls, name="lmcache-server-calls", daemon=True).start()
        return True

    def _listen(self) -> None:
        assert self._outbox is not None
        while True:
            event = p.from_client.decode(receive_frame(self._events))
            if isinstance(event, p.Release):
                self.holdings.release(event.handles)
            elif isinstance(event, p.Publish):
                self._server.passages.add(event.rows, self)
            elif isinstance(event, p.Subscribe):
                self._server.passages.subscribe(self, self._outbox.put)

    def _wait_for_the_end(self) -> None:
        """A client that talks nonsense is not heard any more, but may still be copying."""
        if self._calls is None:
            return
        self.hang_up()
        with suppress(OSError):
            self._events.settimeout(None)
            while self._events.recv(1 << 16):
                pass

    def _answer_calls(self) -> None:
        assert self._calls is not None
        try:
            while True:
                call = p.calls.decode(receive_frame(self._calls))
                if isinstance(call, p.MapSlab):
                    self._map_slab(call)
                else:
                    send_frame(self._calls, p.encode(self._answer(call)))
        except (OSError, ValueError):
            pass  # gone, or no client of ours: the other connection tells which
        finally:
            self._calls.close()

    def _answer(self, call: p.Call) -> p.Reply:
        try:
            return self._handlers[type(call)](call)
        except Exception as error:
            self._server.storage.metrics.failure("server_call")
            log_limited(logger, logging.ERROR, "server:call", "a request failed: %r", error, exc_info=error)
            return p.Refused(repr(error)[:500])

    def _find(self, call: p.Find) -> p.Reply:
        return p.Found(bytes(self._tier_number[tier.name] for tier in self._storage.find(call.keys.decode())))

    def _ask(self, call: p.Ask) -> p.Reply:
        inquiry = self._storage.ask(call.keys.decode(), min(call.timeout, 60.0))
        outbox = self._outbox
        assert outbox is not None
        inquiry.when_over(lambda: outbox.put(p.encode(p.Answered(call.ticket))))
        return p.Done()

    def _acquire(self, call: p.Acquire) -> p.Reply:
        keys = call.keys.decode()
        found = self._storage.acquire_leading(keys) if call.leading else self._storage.acquire_each(keys)
        specs = p.SpecTable()
        places = iter(self.holdings.add_all([each.obj for each in found if each is not None and each.obj], specs))
        hits: list[p.Hit | None] = []
        for index, each in enumerate(found):
            if each is None:
                hits.append(None)
                continue
            number = self._tier_number[each.tier.name]
            if each.read is not None:
                hits.append(p.Hit(number, None))
                each.read.add_done_callback(partial(self._read_ended, call.first_ticket + index))
            else:
                place = next(places, None)
                hits.append(None if place is None else p.Hit(number, place))
        return p.Acquired(hits, specs.raw)

    def _read_ended(self, ticket: int, read: Future[MemoryObj | None]) -> None:
        obj, specs = read.result(), p.SpecTable()
        place = None if obj is None else self.holdings.add(obj, specs)
        if self._outbox is not None:
            self._outbox.put(p.encode(p.Arrived(ticket, place, specs.raw)))

    def _allocate(self, call: p.Allocate) -> p.Reply:
        obj, specs = self._storage.allocate(decode_spec(call.spec)), p.SpecTable()
        place = None if obj is None else self.holdings.add(obj, specs)
        return p.Acquired([] if place is None else [p.Hit(0, place)], specs.raw)

    def _put(self, call: p.Put) -> p.Reply:
        (key,) = call.keys.decode()
        with self.holdings.borrow(call.handle) as obj:
            return p.Flags(bytes([self._storage.put(key, obj)]))

    def _unpin(self, call: p.Unpin) -> p.Reply:
        self.holdings.unpin(call.keys.decode())
        return p.Done()

    def _map_slab(self, call: p.MapSlab) -> None:
        assert self._calls is not None
        found = self._server.memory.pool.descriptor_of(call.slab)
        if found is None:
            send_frame(self._calls, p.encode(p.Refused(f"no slab {call.slab}")))
            return
        descriptor, nbytes = found
        try:
            send_descriptor(self._calls, p.encode(p.Number(nbytes)), descriptor)
        finally:
            os.close(descriptor)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
