"""How long an engine's loop stands still in calls to us."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, TypeVar, cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(slots=True)
class _Calls:
    number: int = 0
    seconds: float = 0.0
    longest: float = 0.0


class _Here(threading.local):
    apart = 0.0
    """Seconds that this thread was told are useful work."""


class HasHooks(Protocol):
    @property
    def hooks(self) -> HookTimes: ...


class HookTimes(Collector):
    """Wall-clock seconds by hook; what :meth:`apart` was told is useful work counts by its own name, not as a hook's.

    Half a microsecond a call. Each hook is called by one thread.
    """

    def __init__(self) -> None:
        self._hooks: dict[str, _Calls] = {}
        self._apart: dict[str, _Calls] = {}
        self.here = _Here()
        self.records = 0
        """How often a call was longer than any of its hook before."""

    @property
    def seconds(self) -> float:
        """In all hooks so far."""
        return sum([calls.seconds for calls in list(self._hooks.values())])

    @property
    def longest(self) -> dict[str, float]:
        """Seconds of the longest single call, by hook."""
        return {name: calls.longest for name, calls in list(self._hooks.items())}

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """The block, within a hook, does work that the engine would have to do itself: a model's forward."""
        start = perf_counter()
        try:
            yield
        finally:
            spent = perf_counter() - start
            self.here.apart += spent
            self._count(self._apart, name, spent)

    def count(self, name: str, seconds: float) -> None:
        """A call of a hook has taken so long, without what was :meth:`apart`."""
        self._count(self._hooks, name, seconds)

    def _count(self, kind: dict[str, _Calls], name: str, seconds: float) -> None:
        calls = kind.get(name)
        if calls is None:
            calls = kind[name] = _Calls()
        calls.number += 1
        calls.seconds += seconds
        if seconds > calls.longest:
            calls.longest = seconds
            self.records += 1

    def collect(self) -> Iterator[Metric]:
        calls = CounterMetricFamily("lmcache_hook_calls", "Calls from the engine's loop.", labels=["hook"])
        seconds = CounterMetricFamily("lmcache_hook_seconds", "Time that its loop spent in them.", labels=["hook"])
        longest = GaugeMetricFamily("lmcache_longest_hook_seconds", "The longest of them so far.", labels=["hook"])
        for name, counted in [*list(self._hooks.items()), *list(self._apart.items())]:
            calls.add_metric([name], counted.number)
            seconds.add_metric([name], counted.seconds)
            longest.add_metric([name], counted.longest)
        yield from (calls, seconds, longest)


def engine_hook(method: F) -> F:
    """Count the time of a method that an engine's loop calls, by its name, in the ``hooks`` of its object."""
    name = method.__name__

    @functools.wraps(method)
    def timed(self: HasHooks, *args: Any, **kwargs: Any) -> Any:
        hooks = self.hooks
        here = hooks.here
        before, start = here.apart, perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            hooks.count(name, perf_counter() - start - (here.apart - before))

    return cast(F, timed)
