"""Nothing of ours raises into an engine's loops: a failure becomes a miss, a count and one log line."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from lmcache.observability.logging import init_logger, log_limited
from lmcache.observability.metrics import Metrics

logger = init_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class HasMetrics(Protocol):
    @property
    def metrics(self) -> Metrics: ...


S = TypeVar("S", bound=HasMetrics)


def report_failure(metrics: Metrics, where: str, error: BaseException) -> None:
    """Count ``error`` and say it once a minute, with its traceback."""
    metrics.failure(where)
    log_limited(
        logger,
        logging.ERROR,
        f"{where}:{type(error).__name__}",
        "%s failed; the request goes on without the cache: %s: %s",
        where,
        type(error).__name__,
        error,
        exc_info=error,
    )


def never_raise(
    fallback: Callable[[], Any],
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Wrap a method so that an exception gives ``fallback()`` instead of reaching the engine."""

    def wrap(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def guarded(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                report_failure(self.metrics, method.__name__, error)
                return cast(R, fallback())

        return guarded  # type: ignore[return-value]  # functools.wraps forgets that self is positional

    return wrap
