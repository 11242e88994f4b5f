from __future__ import annotations

from collections.abc import Callable

import pytest

from lmcache.observability import hook_times
from lmcache.observability.hook_times import HookTimes, engine_hook
from lmcache.observability.metrics import Metrics


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(hook_times, "perf_counter", lambda: clock.now)
    return clock


class Connector:
    def __init__(self, clock: Clock, hooks: HookTimes) -> None:
        self.clock = clock
        self.hooks = hooks

    @engine_hook
    def load(self, seconds: float, then: Callable[[], object] = lambda: None) -> float:
        """Docs."""
        self.clock.now += seconds
        then()
        return seconds

    def blend(self) -> None:
        with self.hooks.apart("blend"):
            self.clock.now += 7


def test_calls_are_counted_by_name(clock: Clock) -> None:
    metrics = Metrics()
    connector = Connector(clock, metrics.hooks)
    for seconds in (1.0, 3.0, 0.5):
        assert connector.load(seconds) == seconds
    assert metrics.hooks.seconds == 4.5
    assert metrics.hooks.longest == {"load": 3.0}
    counted = metrics.snapshot()
    assert counted['lmcache_hook_calls_total{hook="load"}'] == 3
    assert counted['lmcache_hook_seconds_total{hook="load"}'] == 4.5
    assert counted['lmcache_longest_hook_seconds{hook="load"}'] == 3
    assert (Connector.load.__name__, Connector.load.__doc__) == ("load", "Docs.")


def test_a_call_that_raises_is_counted_too(clock: Clock) -> None:
    hooks = HookTimes()
    with pytest.raises(ZeroDivisionError):
        Connector(clock, hooks).load(2, lambda: 1 / 0)
    assert hooks.longest == {"load": 2}


def test_useful_work_is_no_stall(clock: Clock) -> None:
    """A blend computes what the engine would have had to compute."""
    metrics = Metrics()
    connector = Connector(clock, metrics.hooks)
    connector.load(1, connector.blend)
    connector.load(2)
    assert metrics.hooks.seconds == 3
    assert metrics.hooks.longest == {"load": 2}
    counted = metrics.snapshot()
    assert counted['lmcache_hook_seconds_total{hook="blend"}'] == 7
    assert counted['lmcache_longest_hook_seconds{hook="blend"}'] == 7


def test_useful_work_that_fails_is_none_either(clock: Clock) -> None:
    hooks = HookTimes()
    connector = Connector(clock, hooks)

    def failing() -> None:
        with hooks.apart("blend"):
            clock.now += 7
            raise OSError("injected")

    with pytest.raises(OSError, match="injected"):
        connector.load(1, failing)
    assert hooks.longest == {"load": 1}


def test_only_a_record_is_worth_telling_at_once(clock: Clock) -> None:
    metrics = Metrics()
    connector = Connector(clock, metrics.hooks)
    connector.load(2)
    changes = metrics.changes
    for _ in range(100):
        connector.load(1)
    assert metrics.changes == changes, "what tells it takes longer than the calls"
    connector.load(3)
    assert metrics.changes != changes


def test_waits() -> None:
    metrics = Metrics()
    metrics.waited(2.0)
    metrics.waited(0.5)
    counted = metrics.snapshot()
    assert counted["lmcache_waits_total"] == 2
    assert counted["lmcache_wait_seconds_total"] == 2.5
    assert counted["lmcache_longest_wait_seconds"] == 2
