"""Counters, in Prometheus terms. Each engine has its own registry, so that two in one process do not collide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lmcache.observability.hook_times import HookTimes

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
# Fields of `TierCounts`.
_TIER_COUNTERS = {
    "hits": "Reads that found their chunk.",
    "misses": "Reads that did not.",
    "evictions": "Chunks evicted to make room.",
}
_TIER_GAUGES = {
    "entries": "Chunks held.",
    "used_bytes": "Bytes in use.",
    "capacity_bytes": "Bytes that may be in use.",
}


class TierCounts(Protocol):
    """What a storage tier counts itself, in chunks and bytes; ``failures`` by reason."""

    @property
    def entries(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def capacity_bytes(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def failures(self) -> Mapping[str, int]: ...


class Metrics:
    """What happened, in tokens, chunks, bytes and seconds. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._changes = 0
        counter = self._counter
        self._requested = counter("requested_tokens", "Tokens that were looked up.")
        self._reused = counter("reused_tokens", "Tokens whose KV came from the cache.", ["tier"])
        self._stored = counter("stored_tokens", "Tokens whose KV was newly stored.")
        self._failures = counter("failures", "Operations that were given up and became misses.", ["reason"])
        self._dropped = counter("dropped_chunks", "Chunks that a tier would not keep.", ["tier"])
        self._read = counter("read_bytes", "Bytes of KV that came out of a tier.", ["tier"])
        self._written = counter("written_bytes", "Bytes of KV that a tier took.", ["tier"])
        self._blended = counter("blended_requests", "Requests in which known passages were reused behind the prefix.")
        self._fallbacks = counter("blend_fallbacks", "Requests that were not blended after all.", ["reason"])
        self._blend_tokens = counter("blend_tokens", "Tokens of known passages in blended requests.", ["fate"])
        self._blend_seconds = counter("blend_seconds", "Time spent in blends.", ["phase"])
        self._waits = counter("waits", "Requests that waited in the engine's queue until the cache could answer.")
        self._wait_seconds = counter("wait_seconds", "How long they waited.")
        self._longest_wait = Gauge("lmcache_longest_wait_seconds", "The longest of them.", registry=self.registry)
        self._longest_wait_seconds = 0.0
        self.hooks = HookTimes()
        self.registry.register(self.hooks)
        self._seconds = Histogram(
            "lmcache_operation_seconds",
            "Duration of store, retrieve and lookup.",
            ["operation"],
            registry=self.registry,
            buckets=_SECONDS,
        )

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"lmcache_{name}", text, list(labels), registry=self.registry)

    @property
    def changes(self) -> int:
        """Another number when anything was counted since: to ask is cheaper than :meth:`snapshot`, which is worth its
        time only then. What the tiers count themselves moves with the rest, and so do calls of :attr:`hooks`, unless
        one was the longest so far."""
        return self._changes + self.hooks.records

    def requested(self, tokens: int) -> None:
        self._requested.inc(tokens)
        self._changes += 1

    def reused(self, tier: str, tokens: int) -> None:
        self._reused.labels(tier).inc(tokens)
        self._changes += 1

    def stored(self, tokens: int) -> None:
        self._stored.inc(tokens)
        self._changes += 1

    def dropped(self, tier: str, chunks: int = 1) -> None:
        self._dropped.labels(tier).inc(chunks)
        self._changes += 1

    def read(self, tier: str, nbytes: int) -> None:
        self._read.labels(tier).inc(nbytes)
        self._changes += 1

    def written(self, tier: str, nbytes: int) -> None:
        self._written.labels(tier).inc(nbytes)
        self._changes += 1

    def failure(self, reason: str) -> None:
        """An operation was given up; ``reason`` is a short fixed word such as ``disk_read``."""
        self._failures.labels(reason).inc()
        self._changes += 1

    def waited(self, seconds: float) -> None:
        """A request waited so long before it was known what can be reused for it."""
        self._waits.inc()
        self._wait_seconds.inc(max(0.0, seconds))
        self._longest_wait_seconds = max(self._longest_wait_seconds, seconds)
        self._longest_wait.set(self._longest_wait_seconds)
        self._changes += 1

    def blended(self, reused: int, recomputed: int, seconds: Mapping[str, float]) -> None:
        """A request was blended: of the tokens of its passages ``recomputed`` were computed all the same.

        Args:
            seconds: this request's share, by phase.
        """
        self._blended.inc()
        self._blend_tokens.labels("reused").inc(reused - recomputed)
        self._blend_tokens.labels("recomputed").inc(recomputed)
        for phase, spent in seconds.items():
            self._blend_seconds.labels(phase).inc(max(0.0, spent))
        self._changes += 1

    def blend_fallback(self, reason: str) -> None:
        """A request was not blended; ``reason`` is a short fixed word."""
        self._fallbacks.labels(reason).inc()
        self._changes += 1

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Observe the duration of a block of code in seconds."""
        start = perf_counter()
        try:
            yield
        finally:
            self._seconds.labels(operation).observe(perf_counter() - start)
            self._changes += 1

    def watch_tiers(self, stats: Callable[[], Mapping[str, TierCounts]]) -> None:
        """Report what the tiers count themselves, asked for at each scrape and :meth:`snapshot`. Once an engine.

        Args:
            stats: gives each tier's counts by the tier's name; must be thread-safe and must not raise.
        """
        self.registry.register(_TierCollector(stats))

    def snapshot(self) -> dict[str, float]:
        """Every sample by name and labels, as ``name{label="value"}``; creation times are left out."""
        samples = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples


class _TierCollector(Collector):
    """Turns the tiers' own counts into samples: nothing is counted twice."""

    def __init__(self, stats: Callable[[], Mapping[str, TierCounts]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        tiers = self._stats().items()
        for name, text in _TIER_COUNTERS.items():
            counter = CounterMetricFamily(f"lmcache_tier_{name}", text, labels=["tier"])
            for tier, counts in tiers:
                counter.add_metric([tier], getattr(counts, name))
            yield counter
        for name, text in _TIER_GAUGES.items():
            gauge = GaugeMetricFamily(f"lmcache_tier_{name}", text, labels=["tier"])
            for tier, counts in tiers:
                gauge.add_metric([tier], getattr(counts, name))
            yield gauge
        failures = CounterMetricFamily("lmcache_tier_failures", "Reads and writes given up.", labels=["tier", "reason"])
        for tier, counts in tiers:
            for reason, number in counts.failures.items():
                failures.add_metric([tier, reason], number)
        yield failures
