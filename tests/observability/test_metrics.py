from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import generate_latest

from lmcache.observability.metrics import Metrics
from lmcache.storage.interface import TierStats


def test_counts_by_name_and_label() -> None:
    metrics = Metrics()
    metrics.requested(100)
    metrics.reused("memory", 40)
    metrics.reused("disk", 20)
    metrics.reused("memory", 2)
    metrics.stored(40)
    metrics.dropped("disk")
    metrics.read("disk", 4096)
    metrics.written("disk", 8192)
    metrics.failure("disk_read")
    counted = metrics.snapshot()
    assert counted["lmcache_requested_tokens_total"] == 100
    assert counted['lmcache_reused_tokens_total{tier="memory"}'] == 42
    assert counted['lmcache_reused_tokens_total{tier="disk"}'] == 20
    assert counted["lmcache_stored_tokens_total"] == 40
    assert counted['lmcache_dropped_chunks_total{tier="disk"}'] == 1
    assert counted['lmcache_read_bytes_total{tier="disk"}'] == 4096
    assert counted['lmcache_written_bytes_total{tier="disk"}'] == 8192
    assert counted['lmcache_failures_total{reason="disk_read"}'] == 1


def test_durations_are_observed_also_when_it_fails() -> None:
    metrics = Metrics()
    with metrics.timed("store"):
        pass
    with pytest.raises(OSError, match="gone"), metrics.timed("store"):
        raise OSError("gone")
    assert metrics.snapshot()['lmcache_operation_seconds_count{operation="store"}'] == 2


def test_two_engines_do_not_share_counts() -> None:
    one, other = Metrics(), Metrics()
    one.stored(5)
    assert other.snapshot()["lmcache_stored_tokens_total"] == 0


def test_no_count_is_lost_between_threads() -> None:
    metrics = Metrics()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(lambda: [metrics.failure("x") for _ in range(500)])
    assert metrics.snapshot()['lmcache_failures_total{reason="x"}'] == 4000


def test_tiers_are_asked_at_each_scrape() -> None:
    def tier(hits: int, failures: dict[str, int]) -> TierStats:
        return TierStats(
            entries=3,
            used_bytes=300,
            capacity_bytes=1000,
            hits=hits,
            misses=1,
            evictions=2,
            dropped_puts=0,
            failures=failures,
        )

    tiers = {"memory": tier(1, {}), "disk": tier(5, {"read_EIO": 7})}
    metrics = Metrics()
    metrics.watch_tiers(lambda: tiers)
    counted = metrics.snapshot()
    assert counted['lmcache_tier_hits_total{tier="memory"}'] == 1
    assert counted['lmcache_tier_hits_total{tier="disk"}'] == 5
    assert counted['lmcache_tier_misses_total{tier="disk"}'] == 1
    assert counted['lmcache_tier_evictions_total{tier="disk"}'] == 2
    assert counted['lmcache_tier_entries{tier="disk"}'] == 3
    assert counted['lmcache_tier_used_bytes{tier="memory"}'] == 300
    assert counted['lmcache_tier_capacity_bytes{tier="memory"}'] == 1000
    assert counted['lmcache_tier_failures_total{tier="disk",reason="read_EIO"}'] == 7
    tiers["memory"] = tier(2, {})
    assert metrics.snapshot()['lmcache_tier_hits_total{tier="memory"}'] == 2


def test_the_registry_is_what_prometheus_scrapes() -> None:
    metrics = Metrics()
    metrics.watch_tiers(dict)
    metrics.stored(5)
    assert b"lmcache_stored_tokens_total 5.0" in generate_latest(metrics.registry)


def test_whether_anything_was_counted_is_cheap_to_ask() -> None:
    metrics = Metrics()

    def timed() -> None:
        with metrics.timed("store"):
            pass

    counts: list[Callable[[], None]] = [
        lambda: metrics.requested(1),
        lambda: metrics.reused("memory", 1),
        lambda: metrics.stored(1),
        lambda: metrics.dropped("disk"),
        lambda: metrics.read("disk", 1),
        lambda: metrics.written("disk", 1),
        lambda: metrics.failure("load"),
        lambda: metrics.blended(2, 1, {"probe": 0.1}),
        lambda: metrics.blend_fallback("short"),
        timed,
    ]
    for count in counts:
        before, seen = metrics.changes, metrics.snapshot()
        assert metrics.changes == before, "to look changes nothing"
        count()
        assert metrics.changes != before
        assert metrics.snapshot() != seen
