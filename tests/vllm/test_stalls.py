"""What a request loses to us is counted once, and told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the adapter imports vLLM")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lmcache.integration.vllm import stalls
from lmcache.integration.vllm.prometheus import LMCachePromMetrics, LMCacheStats
from lmcache.integration.vllm.stalls import RequestStalls
from lmcache.observability.metrics import Metrics

pytestmark = pytest.mark.vllm


class Engine:
    """Time passes in hooks and between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.metrics = Metrics()
        self.stalls = RequestStalls(self.metrics)
        monkeypatch.setattr(stalls, "time", SimpleNamespace(monotonic=lambda: self.now))

    def hook(self, seconds: float) -> None:
        self.now += seconds
        self.metrics.hooks.count("hook", seconds)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


def test_an_answer_at_once_is_no_wait(engine: Engine) -> None:
    engine.hook(9)
    engine.stalls.looked_up("a", answered=True)
    engine.now += 5
    assert engine.stalls.ended("a") == {"wait": 0, "hooks": 0}
    assert engine.metrics.snapshot()["lmcache_waits_total"] == 0


def test_a_wait_lasts_from_the_first_question_to_the_answer(engine: Engine) -> None:
    for answered in (False, False, True):
        engine.now += 1
        engine.stalls.looked_up("a", answered=answered)
    engine.now += 5
    assert engine.stalls.ended("a") == {"wait": 2000, "hooks": 0}
    counted = engine.metrics.snapshot()
    assert (counted["lmcache_waits_total"], counted["lmcache_longest_wait_seconds"]) == (1, 2)


def test_hooks_count_for_all_that_are_there_and_not_twice(engine: Engine) -> None:
    engine.stalls.looked_up("a", answered=True)
    engine.hook(1)
    engine.stalls.looked_up("b", answered=False)
    engine.hook(2)
    engine.now += 3
    engine.stalls.looked_up("b", answered=True)
    engine.hook(4)
    assert engine.stalls.ended("a") == {"wait": 0, "hooks": 7000}
    assert engine.stalls.ended("b") == {"wait": 5000, "hooks": 4000}


def test_one_that_waits_again_after_a_preemption(engine: Engine) -> None:
    for _ in range(2):
        engine.stalls.looked_up("a", answered=False)
        engine.now += 1
        engine.stalls.looked_up("a", answered=True)
        engine.now += 10
    assert engine.stalls.ended("a")["wait"] == 2000


def test_one_that_is_aborted_while_it_waits_has_waited(engine: Engine) -> None:
    engine.stalls.looked_up("a", answered=False)
    engine.now += 4
    assert engine.stalls.ended("a")["wait"] == 4000
    assert engine.metrics.snapshot()["lmcache_longest_wait_seconds"] == 4
    assert engine.stalls.ended("a") == {"wait": 0, "hooks": 0}, "it is forgotten"


class TestInVLLMsMetrics:
    def told(self, *metrics: Metrics) -> LMCacheStats:
        """What several ranks tell at once."""
        first, *others = (LMCacheStats.since({}, each)[0] for each in metrics)
        for other in others:
            first.aggregate(other)
        return first

    def prom(self) -> tuple[LMCachePromMetrics, CollectorRegistry]:
        registry = CollectorRegistry()

        def here(kind: Any) -> Any:
            return lambda **arguments: kind(**arguments, registry=registry)

        config: Any = SimpleNamespace(kv_transfer_config=None)
        types: Any = {kind: here(kind) for kind in (Gauge, Counter, Histogram)}
        return LMCachePromMetrics(config, types, ["engine"], {0: ["0"], 1: ["1"]}), registry

    def test_of_the_longest_the_largest_counts(self) -> None:
        ranks = Metrics(), Metrics()
        for metrics, seconds in zip(ranks, (3.0, 2.0), strict=True):
            metrics.hooks.count("load", seconds)
        data = self.told(*ranks).data
        assert data['lmcache_longest_hook_seconds{hook="load"}'] == 3
        assert data['lmcache_hook_seconds_total{hook="load"}'] == 5

    def test_it_is_told_when_it_grows(self) -> None:
        metrics = Metrics()
        metrics.waited(2)
        first, seen = LMCacheStats.since({}, metrics)
        metrics.waited(1)
        second, seen = LMCacheStats.since(seen, metrics)
        assert first.data["lmcache_longest_wait_seconds"] == 2
        assert second.data == {"lmcache_waits_total": 1, "lmcache_wait_seconds_total": 1}

    def test_a_gauge_of_each_engine_keeps_it(self) -> None:
        prom, registry = self.prom()
        for engine, seconds in ((0, 2.0), (0, 1.0), (1, 1.5)):
            prom.observe({'lmcache_longest_hook_seconds{hook="load"}': seconds, "lmcache_waits_total": 1}, engine)

        def value(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(name, labels)

        assert value("vllm:lmcache_longest_hook_seconds", engine="0", hook="load") == 2
        assert value("vllm:lmcache_longest_hook_seconds", engine="1", hook="load") == 1.5
        assert value("vllm:lmcache_waits_total", engine="0") == 2
