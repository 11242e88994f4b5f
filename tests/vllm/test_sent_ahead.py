"""A known prompt's bytes set out at its look-up, and its step begins when it is planned: the text stays the same.

What takes the bytes on their way, staging buffers on a GPU, has tests of its own (``tests/kernels``).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the connector imports vLLM")

from lmcache.integration.vllm.connector_metadata import LMCacheConnectorMetadata
from lmcache.integration.vllm.scheduler_side import SchedulerSide
from lmcache.observability.metrics import Metrics
from tests.vllm.harness import run

pytestmark = pytest.mark.vllm

MODULE = "tests.vllm.sent_ahead_scenario"


def tokens(found: dict[str, Any], kind: str) -> list[list[int]]:
    return [answer["tokens"] for answer in found["answers"][kind]]


@pytest.mark.slow
def test_what_is_sent_ahead_of_a_load_is_what_vllm_computes_on() -> None:
    found = run("reloads", module=MODULE, lengths=[300, 600, 1024])
    assert tokens(found, "again") == tokens(found, "cold")
    assert [answer["reuse"]["reused_tokens"] for answer in found["answers"]["again"]] == [256, 512, 1023]
    assert found["loads"] == {"cold": [], "again": 3 * ["sent ahead"], "spoilt": 3 * ["sent ahead"]}
    assert found["begun_early"] == [False] + 5 * [True], "the first one tells where steps run"
    assert found["leaks"] == []
    # The negative control.
    assert all(spoilt != cold for spoilt, cold in zip(tokens(found, "spoilt"), tokens(found, "cold"), strict=True))


class Scheduler(SchedulerSide):
    """Notes what it sends ahead."""

    def __init__(self, *, layerwise: bool = False, broken: bool = False) -> None:
        self.sent: list[tuple[Any, int]] = []

        def send_ahead(lease: Any, start: int) -> None:
            if broken:
                raise RuntimeError("no")
            self.sent.append((lease, start))

        self._shared = SimpleNamespace(send_ahead=send_ahead, metrics=Metrics(), blend_scheduling=None)  # type: ignore[assignment]
        self._config = SimpleNamespace(use_layerwise=layerwise)  # type: ignore[assignment]
        self._has_sent_ahead = False
        self._trackers = {}
        self._asynchronous_loads = []

    def look_up(self, tracker: Any, local_tokens: int = 0) -> list[tuple[Any, int]]:
        """All that was sent so far."""
        self._send_ahead(tracker, local_tokens)
        return self.sent

    def next_step(self) -> LMCacheConnectorMetadata:
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set[str]())
        output = SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=cached, num_scheduled_tokens={})
        return self.build_connector_meta(output)  # type: ignore[arg-type]


def tracker(known: int, prompt: int = 1000) -> Any:
    lease, request = SimpleNamespace(num_tokens=known), SimpleNamespace(num_tokens=prompt)
    return SimpleNamespace(lease=lease, request=request, sent_ahead=None)


def test_one_request_a_step_is_sent_and_each_once() -> None:
    scheduler, one, other = Scheduler(), tracker(512), tracker(256)
    assert scheduler.look_up(one, 16) == [(one.lease, 16)]
    assert len(scheduler.look_up(other)) == 1, "the link is busy"
    scheduler.next_step()
    assert len(scheduler.look_up(one)) == 1, "vLLM had no room for it, and may have none for long"
    assert len(scheduler.look_up(other)) == 2
    scheduler.next_step()
    one.lease = SimpleNamespace(num_tokens=512)  # it was preempted and is looked up again
    assert len(scheduler.look_up(one)) == 3


def test_what_will_not_be_loaded_is_not_sent() -> None:
    assert Scheduler().look_up(tracker(512), 512) == [], "vLLM's own cache has it"
    assert Scheduler().look_up(tracker(512, prompt=512), 511) == [], "the last token is always vLLM's"
    assert Scheduler().look_up(tracker(0)) == []
    assert Scheduler(layerwise=True).look_up(tracker(512)) == [], "its layers are loaded one by one"


def test_a_fault_costs_nothing_but_the_time_won() -> None:
    scheduler = Scheduler(broken=True)
    scheduler.look_up(tracker(512))
    assert scheduler.metrics.snapshot()['lmcache_failures_total{reason="_send_ahead"}'] == 1
