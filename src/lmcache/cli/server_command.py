"""``lmcache server``: one cache for all engines of this host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lmcache.cli.refusing import refuse

_SIGNAL_SECONDS = 0.5


def server(
    socket: Annotated[
        Path | None,
        typer.Option(help="Where to listen. By default server_socket, or server.sock in this user's own directory."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file, instead of the one that LMCACHE_CONFIG_FILE names.")
    ] = None,
    allow_uid: Annotated[
        list[int] | None, typer.Option(help="A user whose processes may attach besides our own; may be repeated.")
    ] = None,
) -> None:
    """Keep the KV of all engines of this host, in memory that they share, on disk and in a shared store.

    The sizes, the disk and the store are configuration keys, as `lmcache config` shows them. Engines attach with
    server_socket, or as LMCacheMPConnector. SIGTERM and Ctrl-C write what is queued and end it.
    """
    import signal
    import sys
    import threading

    from lmcache.config import LMCacheEngineConfig
    from lmcache.config.sources import CONFIG_FILE_VARIABLE
    from lmcache.observability.logging import configure_for_engine
    from lmcache.server.address import default_socket
    from lmcache.server.serve import open_server

    configure_for_engine()
    # Threads take turns that often: an answer must not wait behind another engine's long request.
    sys.setswitchinterval(0.0005)
    environ = dict(os.environ)
    if config is not None:
        environ[CONFIG_FILE_VARIABLE] = str(config)
    over = threading.Event()
    try:
        settings = LMCacheEngineConfig.load(environ=environ)
        path = socket or settings.server_socket or default_socket()
        running = open_server(settings, path, allowed_uids=frozenset(allow_uid or ()))
    except (ValueError, OSError) as error:
        refuse(error)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    typer.echo(f"lmcache server listens at {path} ({settings.max_local_cpu_size:g} GiB of memory)")
    try:
        # A signal that another thread catches, or this one just before it begins to wait, wakes nobody.
        while not over.wait(_SIGNAL_SECONDS):
            pass
    finally:
        running.close()
