"""Our counters in vLLM's own ``/metrics`` and log lines (the dynamic connector)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric, PromMetricT

    from lmcache.observability.metrics import Metrics


_LONGEST = "lmcache_longest_"
"""Prefix of those that are maxima: of several the largest counts, not their sum."""

# Every rank counts these of the same requests, so one of them tells.
_OF_REQUESTS = ("lmcache_requested_", "lmcache_reused_", "lmcache_stored_", "lmcache_blend")


class LMCacheStats(KVConnectorStats):
    """What our counters grew by since the last step: ``data[sample name] = increase``, and maxima that grew, whole."""

    @classmethod
    def since(
        cls, before: dict[str, float], metrics: Metrics, *, of_requests: bool = True
    ) -> tuple[LMCacheStats, dict[str, float]]:
        """The growth since the snapshot ``before``, and the snapshot to pass next time.

        Args:
            of_requests: also what another rank counts too: requests and tokens.
        """
        now = {
            name: value
            for name, value in metrics.snapshot().items()
            if ("_total" in name or name.startswith(_LONGEST)) and (of_requests or not name.startswith(_OF_REQUESTS))
        }
        grown = {name: value for name, value in now.items() if value != before.get(name, 0.0)}
        counted = {
            name: value if name.startswith(_LONGEST) else value - before.get(name, 0.0) for name, value in grown.items()
        }
        return cls(data=counted), now

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, growth in other.data.items():
            before = self.data.get(name, 0.0)
            self.data[name] = max(before, growth) if name.startswith(_LONGEST) else before + growth
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name.removeprefix("lmcache_"): growth for name, growth in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class StatsTeller:
    """Tells what one :class:`Metrics` grew by since it was last asked."""

    def __init__(self, metrics: Metrics, *, of_requests: bool = True) -> None:
        """``of_requests``: see :meth:`LMCacheStats.since`."""
        self._metrics = metrics
        self._of_requests = of_requests
        self._counted: dict[str, float] = {}
        self._changes_told = 0

    def since_last(self) -> LMCacheStats | None:
        """Asked in every step; most have nothing to tell."""
        changes = self._metrics.changes
        if changes == self._changes_told:
            return None
        self._changes_told = changes
        stats, self._counted = LMCacheStats.since(self._counted, self._metrics, of_requests=self._of_requests)
        return None if stats.is_empty() else stats


class LMCachePromMetrics(KVConnectorPromMetrics):
    """One vLLM metric for each of ours, labelled with vLLM's engine and model, made when it first moves."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._families: dict[str, Any] = {}
        self._longest: dict[tuple[int, str], float] = {}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for sample, growth in transfer_stats_data.items():
            name, labels = _split(sample)
            is_longest = name.startswith(_LONGEST)
            family = self._families.get(name)
            if family is None:
                plain = name.removesuffix("_total")
                family = self._families[name] = (self._gauge_cls if is_longest else self._counter_cls)(
                    # vLLM's own prefix: its snapshot of metrics leaves others out.
                    name=f"vllm:{plain}",
                    documentation=f"{plain.replace('_', ' ')}, see lmcache.observability.metrics.",
                    labelnames=[*self._labelnames, *labels],
                )
            metric = family.labels(*self.per_engine_labelvalues[engine_idx], *labels.values())
            if is_longest:
                longest = self._longest[engine_idx, sample] = max(growth, self._longest.get((engine_idx, sample), 0.0))
                metric.set(longest)
            else:
                metric.inc(growth)


def _split(sample: str) -> tuple[str, dict[str, str]]:
    """``name{label="value",…}`` in its parts; our label values hold neither commas nor quotes."""
    name, _, rest = sample.partition("{")
    pairs = (pair.split("=", 1) for pair in rest.removesuffix("}").split(",") if pair)
    return name, {label: value.strip('"') for label, value in pairs}
