"""Frames are sent in the background, and what can wait is gathered until then."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache.server import holdings
from lmcache.server.outbox import Outbox
from lmcache.server.server import CacheServer
from lmcache.sockets.frames import receive_frame
from tests.engine.helpers import kv_of, tokens_of
from tests.eventually import eventually
from tests.server.clients import manager_at


def test_a_function_is_asked_when_its_turn_has_come() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outbox, go, said = Outbox(ours, "outbox"), threading.Event(), [b"early"]

        def wait() -> bytes:
            go.wait(10)
            return b"first"

        outbox.put(wait)
        outbox.put(lambda: said[-1])
        outbox.put(b"last")
        said.append(b"late")
        go.set()
        assert [receive_frame(theirs) for _ in range(3)] == [b"first", b"late", b"last"]
        outbox.close()


def test_what_a_retrieve_lets_go_of_is_one_message(here: CacheServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the client's thread lets go of chunk after chunk, the one that sends has no turn."""
    released: list[int] = []
    release = holdings.Holdings.release

    def count(self: holdings.Holdings, handles: list[int]) -> None:
        released.append(len(handles))
        release(self, handles)

    go = threading.Event()
    put = Outbox.put

    def put_late(self: Outbox, payload: bytes | Callable[[], bytes]) -> None:
        put(self, payload if isinstance(payload, bytes) else lambda: (go.wait(10), payload())[1])

    monkeypatch.setattr(holdings.Holdings, "release", count)
    with manager_at(here.path) as manager:
        tokens = tokens_of(320)
        assert manager.engine.store(tokens, kv_of(tokens)) == 320
        stored = len(manager.engine.prefix_keys(tokens))
        assert eventually(lambda: sum(released) == stored)
        monkeypatch.setattr(Outbox, "put", put_late)
        released.clear()
        with manager.engine.prefetch(tokens) as lease:
            assert lease.num_tokens == 320
        go.set()
        assert eventually(lambda: sum(released) == stored)
        assert released == [stored]


def test_nothing_is_held_after_the_last_release(here: CacheServer, tmp_path: Path) -> None:
    with manager_at(here.path) as manager:
        tokens = tokens_of(320)
        manager.engine.store(tokens, kv_of(tokens))
        manager.engine.retrieve(tokens, return_tuple=False)
        manager.engine.clear()
        assert eventually(lambda: manager.engine.clear() == 0 and here.memory.pool.used_bytes == 0)
