"""``CacheServer``: owns the host pool and the tiers, and serves every engine that attaches."""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

from lmcache.observability.logging import init_logger, log_limited
from lmcache.segmentation.passage_catalog import PassageCatalog
from lmcache.server.passage_board import PassageBoard
from lmcache.server.session import Session
from lmcache.sockets.local import listen, peer_uid
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.tiered import TieredStorage

logger = init_logger(__name__)


class CacheServer:
    """Listens from the moment it is built. No client, whatever it sends, brings it down or disturbs another."""

    def __init__(
        self,
        path: Path,
        memory: LocalCPUTier,
        storage: TieredStorage,
        *,
        catalog: PassageCatalog | None = None,
        allowed_uids: frozenset[int] = frozenset(),
    ) -> None:
        """Takes over ``storage`` and ``catalog``.

        Args:
            memory: the first tier of ``storage``, of shared memory.
            allowed_uids: users besides our own whose processes may attach. They see everything that is held.

        Raises:
            OSError: there is no listening at ``path``.
        """
        self.memory = memory
        self.storage = storage
        self.tiers = tuple(storage.stats())
        self.asks = storage.asks
        self.generation = os.urandom(16)
        self.path = path
        self._allowed = allowed_uids | {os.getuid()}
        self._changed = threading.Condition()
        self._sessions: set[Session] = set()
        self._closed = False
        self._listener = listen(path, "another server listens there")
        if allowed_uids:
            path.chmod(0o666)  # who may come in is decided by who they are
        self.passages = PassageBoard(storage.holds, catalog)
        self._accepting = threading.Thread(target=self._accept, name="lmcache-server", daemon=True)
        self._accepting.start()

    @property
    def clients(self) -> int:
        with self._changed:
            return len(self._sessions)

    def close(self, patience: float = 1.0) -> None:
        """Stop answering, write what is queued for slower tiers, let every client go. Idempotent.

        Nothing that a client may still be reading is overwritten: its own mapping outlives the server.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            sessions = list(self._sessions)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        for session in sessions:
            session.hang_up()
        self.passages.close()
        self.storage.flush(60.0)
        self.storage.close()
        for session in sessions:
            session.disconnect()
        with self._changed:
            self._changed.wait_for(lambda: not self._sessions, patience)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                log_limited(logger, logging.ERROR, "server:accept", "a client cannot be accepted: %r", error)
                continue
            uid = peer_uid(connection)
            if uid is not None and uid not in self._allowed:
                log_limited(
                    logger, logging.WARNING, "server:refused", "a process of user %d was refused; allowed: %s",
                    uid, sorted(self._allowed),
                )  # fmt: skip
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="lmcache-server-client", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        session = Session(self, connection)
        with self._changed:
            if self._closed:
                connection.close()
                return
            self._sessions.add(session)
        try:
            session.run()
        finally:
            with self._changed:
                self._sessions.discard(session)
                self._changed.notify_all()
