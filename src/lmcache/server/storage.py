"""``ServerStorage``: the tiers of a server, as an engine's storage."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.observability.metrics import Metrics
from lmcache.server import protocol as p
from lmcache.server.attachment import Attachment
from lmcache.server.client import ServerClient
from lmcache.storage.inquiry import Inquiry
from lmcache.storage.interface import TierStats
from lmcache.storage.kv_storage import Found, KVStorage
from lmcache.storage.spec_codec import encode_spec

T = TypeVar("T")

CLEAR_SECONDS = 60.0
_FLUSH_STEP = 0.02
_STATS_SECONDS = 1.0


class _Tier(NamedTuple):
    name: str


class ServerStorage(KVStorage):
    """While there is no server everything is a miss. An object of a server that was lost is never put into another."""

    def __init__(self, client: ServerClient, metrics: Metrics) -> None:
        """Takes over ``client``, whose metrics are ``metrics``."""
        self.client = client
        self.metrics = metrics
        self._stats_lock = threading.Lock()
        self._stats: dict[str, TierStats] = {}
        self._stats_at = 0.0
        metrics.watch_tiers(self.stats)

    # Looking

    def find(self, keys: Sequence[CacheKey]) -> list[_Tier]:
        def ask(server: Attachment) -> list[_Tier]:
            found = _expect(server.call(p.Find(p.Keys.of(keys))), p.Found)
            return [_Tier(server.welcome.tiers[number]) for number in found.tiers]

        return self._try("lookup", ask, []) if keys else []

    def holds(self, keys: Sequence[CacheKey]) -> list[bool]:
        missing = [False] * len(keys)
        return self._try("lookup", lambda server: _flags(server, p.Holds(p.Keys.of(keys)), keys), missing)

    def ask(self, keys: Sequence[CacheKey], timeout: float) -> Inquiry:
        def ask(server: Attachment) -> Inquiry:
            if not server.welcome.asks:
                return Inquiry()
            (ticket,) = server.tickets(1)
            answer = server.expect_answer(ticket)
            server.call(p.Ask(p.Keys.of(keys), ticket, timeout))
            return Inquiry([answer], timeout)

        return self._try("ask", ask, Inquiry()) if keys else Inquiry()

    # Getting

    def acquire_leading(self, keys: Sequence[CacheKey]) -> list[Found]:
        found = self._acquire(keys, leading=True)
        # One that could not be mapped hides those behind it.
        until = next((index for index, each in enumerate(found) if each is None), len(found))
        for each in found[until:]:
            if each is not None:
                _give_back(each)
        return [each for each in found[:until] if each is not None]

    def acquire_each(self, keys: Sequence[CacheKey]) -> list[Found | None]:
        found = self._acquire(keys, leading=False)
        return found + [None] * (len(keys) - len(found))

    def _acquire(self, keys: Sequence[CacheKey], *, leading: bool) -> list[Found | None]:
        def ask(server: Attachment) -> list[Found | None]:
            tickets = server.tickets(len(keys))
            server.expect_reads(tickets)
            started: set[int] = set()
            held: Counter[str] = Counter()
            try:
                acquired = _expect(server.call(p.Acquire(p.Keys.of(keys), tickets[0], leading)), p.Acquired)
                specs = p.decode_specs(acquired.specs)
                found: list[Found | None] = []
                for ticket, hit in zip(tickets, acquired.hits, strict=False):
                    if hit is None:
                        found.append(None)
                        continue
                    tier = _Tier(server.welcome.tiers[hit.tier])
                    if hit.place is None:
                        started.add(ticket)
                        read = server.read(ticket)
                        found.append(Found(tier, None, read))
                        read.add_done_callback(self._count_read(tier.name))
                    elif (obj := server.open(hit.place, specs)) is not None:
                        held[tier.name] += obj.spec.nbytes
                        found.append(Found(tier, obj, None))
                    else:
                        found.append(None)
                return found
            finally:
                server.forget_reads([ticket for ticket in tickets if ticket not in started])
                for name, nbytes in held.items():
                    self.metrics.read(name, nbytes)

        return self._try("acquire", ask, []) if keys else []

    def _count_read(self, tier: str) -> Callable[[Future[MemoryObj | None]], None]:
        def count(read: Future[MemoryObj | None]) -> None:
            if (obj := read.result()) is not None:
                self.metrics.read(tier, obj.spec.nbytes)

        return count

    # Putting

    def allocate(self, spec: KVSpec) -> MemoryObj | None:
        def ask(server: Attachment) -> MemoryObj | None:
            acquired = _expect(server.call(p.Allocate(encode_spec(spec))), p.Acquired)
            place = acquired.hits[0].place if acquired.hits and acquired.hits[0] is not None else None
            return None if place is None else server.open(place, p.decode_specs(acquired.specs))

        return self._try("allocate", ask, None)

    def put(self, key: CacheKey, obj: MemoryObj) -> bool:
        def ask(server: Attachment) -> bool:
            if not server.owns(obj):
                return False  # of a server that was lost meanwhile
            return _flags(server, p.Put(p.Keys.of([key]), obj.offset), [key])[0]

        kept = self._try("put", ask, False)
        if kept:
            self.metrics.written("server", obj.spec.nbytes)
        else:
            self.metrics.dropped("server")
        return kept

    def renew(self, key: CacheKey) -> bool:
        return self._try("renew", lambda server: _flags(server, p.Renew(p.Keys.of([key])), [key])[0], False)

    # Keeping

    def pin(self, keys: Sequence[CacheKey]) -> int:
        return self._try("pin", lambda server: _number(server, p.Pin(p.Keys.of(keys))), 0) if keys else 0

    def unpin(self, keys: Sequence[CacheKey]) -> None:
        if keys:
            self._try("unpin", lambda server: server.call(p.Unpin(p.Keys.of(keys))), None)

    def clear(self) -> int:
        return self._try("clear", lambda server: _number(server, p.Clear(), CLEAR_SECONDS), 0)

    # The whole

    def flush(self, timeout: float | None = None) -> bool:
        """With no server there is nothing to wait for."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._try("flush", lambda server: _flags(server, p.Flush(), [None])[0], True):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(_FLUSH_STEP)
        return True

    def stats(self) -> dict[str, TierStats]:
        """Of all that the server does, for whomever; a second old at most, or what it said last."""
        with self._stats_lock:
            if time.monotonic() - self._stats_at > _STATS_SECONDS:
                said = self._try("stats", lambda server: _expect(server.call(p.Stats()), p.TierCounts), None)
                if said is not None:
                    self._stats = said.tiers
                self._stats_at = time.monotonic()
            return self._stats

    def close(self) -> None:
        """Let go of the server, which goes on."""
        self.client.close()

    def _try(self, what: str, ask: Callable[[Attachment], T], fallback: T) -> T:
        server = self.client.attachment
        if server is None:
            self.metrics.failure("server_away")
            return fallback
        try:
            return ask(server)
        except Exception as error:
            self.client.failed(what, error)
            return fallback


ReplyT = TypeVar("ReplyT", bound=p.Message)


def _expect(reply: p.Reply, kind: type[ReplyT]) -> ReplyT:
    if not isinstance(reply, kind):
        raise ValueError(f"the server answered {type(reply).__name__} instead of {kind.__name__}")
    return reply


def _number(server: Attachment, call: p.Call, timeout: float | None = None) -> int:
    return _expect(server.call(call, timeout), p.Number).number


def _flags(server: Attachment, call: p.Call, wanted: Sequence[object]) -> list[bool]:
    flags = _expect(server.call(call), p.Flags).flags
    if len(flags) != len(wanted):
        raise ValueError(f"{len(flags)} answers to {len(wanted)} questions")
    return [bool(flag) for flag in flags]


def _give_back(found: Found) -> None:
    if found.obj is not None:
        found.obj.ref_down()
    elif found.read is not None:
        found.read.add_done_callback(_drop)


def _drop(read: Future[MemoryObj | None]) -> None:
    if (obj := read.result()) is not None:
        obj.ref_down()
