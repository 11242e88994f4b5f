"""A rank's side of the talk: answers the scheduler of its engine out of the rank's own cache."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lmcache.blend.find_passages import ask_others, find_matches
from lmcache.blend.passage_lease import PassageLease
from lmcache.integration.guard import report_failure
from lmcache.integration.vllm.parallel.messages import (
    PROTOCOL,
    Answer,
    AreSaving,
    Clear,
    Describe,
    Description,
    FindPassages,
    Hello,
    HoldPassages,
    LeaseState,
    Look,
    LookAtPassages,
    LookUp,
    Match,
    Matches,
    MatchPiece,
    Outcome,
    PassagesState,
    Refused,
    Release,
    Reply,
    Request,
    WhatBecameOf,
    split_digests,
)
from lmcache.integration.vllm.parallel.rendezvous import listen, socket_path
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.keys import CacheKey, Namespace, PrefixKey, SegmentKey
from lmcache.lease import PrefixLease
from lmcache.observability.logging import init_logger, log_limited
from lmcache.segmentation.passage_index import PassageMatch, Piece
from lmcache.sockets.frames import ConnectionLostError, receive_frame, send_frame
from lmcache.sockets.local import is_same_user

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class RankService:
    """Serves one scheduler at a time. What is held for it is given back when its connection ends.

    A lease waits in ``shared.handed_over`` under the scheduler's name for it: a load that was planned finds it there.
    """

    def __init__(self, shared: SharedEngine, path: Path, *, rank: int, world_size: int) -> None:
        """Raises:
        OSError: there is no listening at ``path``.
        """
        self._shared = shared
        self._path = path
        self._hello = Hello(PROTOCOL, world_size, rank)
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._encoder = msgspec.msgpack.Encoder()
        self._answers: dict[type, Callable[[Any], Reply | None]] = {
            Describe: self._describe,
            LookUp: self._look_up,
            Look: self._look,
            FindPassages: self._find_passages,
            HoldPassages: self._hold_passages,
            LookAtPassages: self._look_at_passages,
            Release: self._release,
            AreSaving: self._are_saving,
            WhatBecameOf: self._what_became_of,
            Clear: self._clear,
        }
        self._closed = False
        self._connection: socket.socket | None = None
        self._listener = listen(path)
        self._thread = threading.Thread(target=self._serve, name="lmcache-rank", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, shared: SharedEngine, vllm_config: VllmConfig) -> None:
        """Serve ``shared`` until it is closed. Without a socket the rank is never asked, and everything is a miss."""
        parallel = vllm_config.parallel_config
        try:
            path = socket_path(str(vllm_config.kv_transfer_config.engine_id), parallel.rank)
            service = cls(shared, path, rank=parallel.rank, world_size=parallel.world_size)
        except OSError as error:
            report_failure(shared.metrics, "rank_service", error)
        else:
            shared.companions.callback(service.close)

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        for end in (self._listener, self._connection):
            if end is not None:
                _shut(end)
        self._thread.join(timeout=5)
        self._path.unlink(missing_ok=True)

    # The connection

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._connection = connection
                try:
                    if is_same_user(connection):
                        self._converse(connection)
                except (OSError, msgspec.DecodeError) as error:
                    if not self._closed:
                        logger.debug("the scheduler's connection has ended: %s", error)
                finally:
                    self._connection = None
                    self._give_back_all()

    def _converse(self, connection: socket.socket) -> None:
        greeted = False
        while True:
            message = self._decoder.decode(receive_frame(connection))
            if isinstance(message, Hello):
                greeted = message == self._hello
                if not greeted:
                    words = f"{message} is not a scheduler of ours: this is {self._hello}"
                    log_limited(logger, logging.WARNING, "rank_service:hello", "%s", words)
                reply: Reply | None = self._hello
            elif not greeted:
                raise ConnectionLostError("the other side has not said who it is")
            else:
                reply = self._answer(message)
            if reply is not None:
                send_frame(connection, self._encoder.encode(reply))

    def _answer(self, message: Any) -> Reply | None:
        try:
            return self._answers[type(message)](message)
        except Exception as error:
            report_failure(self._shared.metrics, f"rank_{type(message).__name__.lower()}", error)
            return Refused(f"{type(error).__name__}: {error}")

    # The answers: prefixes

    def _describe(self, _: Describe) -> Description:
        connector = self._shared.engine.gpu_connector
        if connector is None:
            return Description()
        return Description(connector.layout, self._shared.blender is not None)

    def _look_up(self, message: LookUp) -> LeaseState:
        engine = self._shared.engine
        namespace = engine.namespace(lora=message.lora, cache_salt=message.cache_salt, paged=True)
        keys = [PrefixKey(namespace.id + digest) for digest in split_digests(message.digests)]
        # Only the number of tokens counts once the keys are known.
        lease = engine.prefetch(range(message.num_tokens), paged=True, keys=keys, ask_stores=True)
        self._shared.handed_over[message.lease] = lease
        return _state(lease)

    def _look(self, message: Look) -> LeaseState:
        lease = self._shared.handed_over.get(message.lease)
        if lease is None:
            return LeaseState()
        if message.cut:
            lease.cut()
        return _state(lease)

    # Passages

    def _find_passages(self, message: FindPassages) -> Matches:
        known = self._shared.manager.passages
        if known is None:
            return Matches(())
        namespace = self._shared.engine.namespace(lora=message.lora, cache_salt=message.cache_salt, paged=True)
        tokens = np.frombuffer(message.tokens, dtype="<u4")
        ask_others(self._shared.manager.shared_passages, tokens, message.start, message.ranges, namespace.id).wait()
        found = find_matches(known, self._shared.config, tokens, message.start, message.ranges, namespace.id)
        return Matches(tuple(_told(match) for match in found))

    def _hold_passages(self, message: HoldPassages) -> PassagesState:
        engine = self._shared.engine
        connector = engine.gpu_connector
        assert connector is not None
        namespace = engine.namespace(lora=message.lora, cache_salt=message.cache_salt, paged=True)
        matches = [_read(match, namespace) for match in message.matches]
        lease = PassageLease.take(engine.storage, matches, connector.spec)
        self._shared.held_passages[message.lease] = lease
        return PassagesState(lease.ready(), lease.tiers())

    def _look_at_passages(self, message: LookAtPassages) -> PassagesState:
        lease = self._shared.held_passages[message.lease]
        if message.cut:
            lease.cut()
        ready = lease.ready()  # first, as above
        return PassagesState(ready, lease.tiers())

    # Both

    def _release(self, message: Release) -> None:
        for leases in (self._shared.handed_over, self._shared.held_passages):
            lease = leases.pop(message.lease, None)
            if lease is not None:
                lease.release()

    def _are_saving(self, message: AreSaving) -> Answer:
        return Answer(self._shared.saves.will_hold(PrefixKey(message.key)))

    def _what_became_of(self, message: WhatBecameOf) -> Outcome:
        failed = message.req_id in self._shared.failed_loads
        if not message.forget:
            return Outcome(failed)
        self._shared.failed_loads.discard(message.req_id)
        report = self._shared.blend_reports.pop(message.req_id, None)
        return Outcome(failed, b"" if report is None else msgspec.json.encode(report))

    def _clear(self, _: Clear) -> Answer:
        self._shared.saves.wait()
        self._shared.engine.clear()
        return Answer(True)

    def _give_back_all(self) -> None:
        for name in [*self._shared.handed_over, *self._shared.held_passages]:
            self._release(Release(name))


def _state(lease: PrefixLease) -> LeaseState:
    ready = lease.ready()  # first: a lease that is ready does not change any more
    return LeaseState(lease.num_tokens, ready, tuple(lease.tier_runs()))


def _told(match: PassageMatch[CacheKey]) -> Match:
    pieces = (
        MatchPiece(piece.start, piece.end, piece.offset, piece.key.digest, isinstance(piece.key, PrefixKey))
        for piece in match.pieces
    )
    return Match(match.start, match.end, match.old_start, tuple(pieces))


def _read(match: Match, namespace: Namespace) -> PassageMatch[CacheKey]:
    pieces: list[Piece[CacheKey]] = []
    for piece in match.pieces:
        kind = PrefixKey if piece.is_prefix else SegmentKey
        pieces.append(Piece(piece.start, piece.end, kind(namespace.id + piece.digest), piece.offset))
    return PassageMatch(match.start, match.end, match.old_start, tuple(pieces))


def _shut(end: socket.socket) -> None:
    """Wake whoever waits in it."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
