"""What the client processes of the tests do."""

from __future__ import annotations

import sys
from pathlib import Path

from lmcache.manager import LMCacheManager
from tests.engine.helpers import kv_of, make_config, make_metadata, tokens_of


def manager_at(socket: str | Path, **settings: object) -> LMCacheManager:
    return LMCacheManager(make_config(server_socket=socket, **settings), make_metadata())


def store(socket: str, count: str, seed: str) -> None:
    """Store one prompt and leave."""
    tokens = tokens_of(int(count), int(seed))
    with manager_at(socket) as manager:
        print(manager.engine.store(tokens, kv_of(tokens)), flush=True)


def hold(socket: str, seed: str) -> None:
    """Store a prompt, pin it, lease it, be in the middle of another store; and wait to be killed."""
    tokens, other = tokens_of(64, int(seed)), tokens_of(64, int(seed) + 1)
    manager = manager_at(socket)
    manager.engine.store(tokens, kv_of(tokens))
    assert manager.engine.pin(tokens) == 64
    lease = manager.engine.prefetch(tokens)
    assert lease.num_tokens == 64
    layers = manager.engine.store_layer(other)
    next(layers)
    layers.send(tuple(kv_of(other)[0].unbind(0)))
    print("holding", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
