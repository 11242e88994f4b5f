"""The scheduler's side of the talk: asks all ranks at once, and takes no answer for a miss."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from lmcache.integration.vllm.parallel.messages import (
    PROTOCOL,
    Hello,
    Refused,
    Reply,
    Request,
)
from lmcache.observability.logging import init_logger, log_limited
from lmcache.observability.metrics import Metrics
from lmcache.sockets.frames import receive_frame, send_frame
from lmcache.sockets.local import is_same_user

logger = init_logger(__name__)

ReplyT = TypeVar("ReplyT", bound=Reply)

REPLY_SECONDS = 2.0
"""How long the scheduler waits for a rank. Usually 0.1 ms; more than this and something is wrong there."""
PAUSE_SECONDS = 5.0
"""How long a rank that did not answer is left alone: meanwhile all is a miss."""


class RankUnavailableError(ConnectionError):
    """A rank did not answer, or not what was asked."""


class _Rank:
    """One connection. Replies come in the order of the requests, so after a fault it is of no further use."""

    def __init__(self, path: Path, hello: Hello) -> None:
        """Raises:
        OSError: nobody listens there, or somebody else does.
        """
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._encoder = msgspec.msgpack.Encoder()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(REPLY_SECONDS)
            self._socket.connect(str(path))
            if not is_same_user(self._socket):
                raise PermissionError(f"{path} is served by a process of another user")
            self.send(hello)
            if (answer := self.receive(Hello, time.monotonic() + REPLY_SECONDS)) != hello:
                raise RankUnavailableError(f"{path} is {answer}, not {hello}")
        except BaseException:
            self._socket.close()
            raise

    def send(self, message: Request) -> None:
        self._socket.settimeout(REPLY_SECONDS)
        send_frame(self._socket, self._encoder.encode(message))

    def receive(self, kind: type[ReplyT], deadline: float) -> ReplyT:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        reply = self._decoder.decode(receive_frame(self._socket))
        if isinstance(reply, Refused):
            raise RankUnavailableError(reply.reason)
        if not isinstance(reply, kind):
            raise RankUnavailableError(f"{type(reply).__name__} in place of {kind.__name__}")
        return reply

    def close(self) -> None:
        self._socket.close()


class Ranks:
    """All ranks of an engine, on this host. Connected when they are first asked, and again after a fault.

    They answer together or not at all: the KV of some ranks is of no use without that of the others. Used by one
    thread, the scheduler's; never raises.
    """

    def __init__(self, paths: Sequence[Path], metrics: Metrics) -> None:
        self._paths = tuple(paths)
        self._metrics = metrics
        self._ranks: list[_Rank] | None = None
        self._again_at = 0.0
        self.connections = 0
        """How often they were connected: what was held before the last time is gone."""

    @property
    def connected(self) -> bool:
        return self._ranks is not None

    def ask(self, message: Request, kind: type[ReplyT], timeout: float = REPLY_SECONDS) -> list[ReplyT] | None:
        """The reply of every rank, in order of the ranks; None when one of them gave none."""
        ranks = self._connected()
        if ranks is None:
            return None
        deadline = time.monotonic() + timeout
        try:
            for rank in ranks:
                rank.send(message)
            return [rank.receive(kind, deadline) for rank in ranks]
        except Exception as error:
            self._failed(error)
            return None

    def ask_first(self, message: Request, kind: type[ReplyT]) -> ReplyT | None:
        """The reply of the first rank alone; None when it gave none."""
        ranks = self._connected()
        if ranks is None:
            return None
        try:
            ranks[0].send(message)
            return ranks[0].receive(kind, time.monotonic() + REPLY_SECONDS)
        except Exception as error:
            self._failed(error)
            return None

    def tell(self, message: Request) -> None:
        """Send what is not answered."""
        if self._ranks is None:
            return
        try:
            for rank in self._ranks:
                rank.send(message)
        except Exception as error:
            self._failed(error)

    def close(self) -> None:
        """The ranks give back what they held for us."""
        ranks, self._ranks = self._ranks, None
        for rank in ranks or ():
            rank.close()

    def _connected(self) -> list[_Rank] | None:
        if self._ranks is not None:
            return self._ranks
        if time.monotonic() < self._again_at:
            return None
        made: list[_Rank] = []
        try:
            for number, path in enumerate(self._paths):
                made.append(_Rank(path, Hello(PROTOCOL, len(self._paths), number)))
        except Exception as error:
            for rank in made:
                rank.close()
            self._failed(error)
            return None
        self._ranks = made
        self.connections += 1
        return made

    def _failed(self, error: Exception) -> None:
        # Of no further use are a connection that broke off in mid-talk, and the others without it.
        self.close()
        self._again_at = time.monotonic() + PAUSE_SECONDS
        self._metrics.failure("rank")
        log_limited(
            logger,
            logging.ERROR,
            f"ranks:{type(error).__name__}",
            "the cache of a rank does not answer (%s: %s); for %g s nothing is reused",
            type(error).__name__,
            error,
            PAUSE_SECONDS,
        )
