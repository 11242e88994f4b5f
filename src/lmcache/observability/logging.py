"""Log lines of ours: standard loggers, and lines that come at most once in a while."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

LOG_LEVEL_VARIABLE = "LMCACHE_LOG_LEVEL"

_last_said: dict[str, float] = {}
_lock = threading.Lock()


def init_logger(name: str) -> logging.Logger:
    """The logger of a module of ours (``__name__``). It has no handlers: that is the application's choice."""
    return logging.getLogger(name)


def configure_for_engine() -> None:
    """Make our lines visible inside a server that sets up only its own loggers, as vLLM does. Idempotent.

    Handlers that the application gave to the root logger or to ``lmcache`` are used as they are.
    ``LMCACHE_LOG_LEVEL`` sets our level, by default INFO unless the application has set one.
    """
    ours = logging.getLogger("lmcache")
    level = os.environ.get(LOG_LEVEL_VARIABLE, "").strip().upper()
    known = not level or isinstance(logging.getLevelName(level), int)
    if level and known:
        ours.setLevel(level)
    elif ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
    if not ours.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%m-%d %H:%M:%S"))
        ours.addHandler(handler)
        ours.propagate = False
    if not known:
        log_limited(ours, logging.WARNING, LOG_LEVEL_VARIABLE, "%s=%r is not a log level", LOG_LEVEL_VARIABLE, level)


def log_limited(
    logger: logging.Logger,
    level: int,
    key: str,
    message: str,
    *args: object,
    interval: float = 60.0,
    **kwargs: Any,
) -> None:
    """Log ``message``, but at most one line per ``key`` in ``interval`` seconds, whichever logger it goes to.

    ``key`` is one of a few fixed words (every one is remembered); ``kwargs`` are those of :meth:`logging.Logger.log`.
    """
    now = time.monotonic()
    with _lock:
        last = _last_said.get(key)
        if last is not None and now - last < interval:
            return
        _last_said[key] = now
    logger.log(level, message, *args, stacklevel=2, **kwargs)
