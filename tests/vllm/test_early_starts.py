"""A step that loads or blends is begun as soon as it is planned, once, and only where it would run anyway."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="the connector imports vLLM")

from lmcache.integration.vllm.connector_metadata import BlendOp, LMCacheConnectorMetadata, LoadOp
from lmcache.integration.vllm.early_start import EarlyStart
from lmcache.integration.vllm.scheduler_side import SchedulerSide
from lmcache.integration.vllm.worker_side import WorkerSide
from lmcache.observability.metrics import Metrics

pytestmark = pytest.mark.vllm


class Worker(WorkerSide):
    """Notes what it starts."""

    def __init__(self, *, layerwise: bool = False) -> None:
        saves = SimpleNamespace(wait=lambda _: None, free_when_done=lambda _: None)
        config = SimpleNamespace(use_layerwise=layerwise)
        self._shared = SimpleNamespace(metrics=Metrics(), saves=saves, config=config)  # type: ignore[assignment]
        self._device = torch.device("cpu")
        self._meta = None
        self._early = EarlyStart(lambda: self.in_step)
        self.in_step = False
        self.started: list[LMCacheConnectorMetadata] = []

    def _start(self, meta: LMCacheConnectorMetadata, context: Any) -> None:
        assert self._meta is meta, "what it may overwrite was waited for"
        self.started.append(meta)

    def run(self, meta: LMCacheConnectorMetadata) -> None:
        """As vLLM does once it has prepared the forward."""
        self.in_step = True
        self.bind_connector_metadata(meta)
        self.start_load_kv(meta)

    def has_started(self, meta: LMCacheConnectorMetadata) -> bool:
        return any(started is meta for started in self.started)

    def end(self) -> None:
        """vLLM 0.25 does not call ``wait_for_save`` of a step without a forward, as the one after a request's last."""
        self.in_step = False


def step(*, blends: bool = True, loads: bool = False) -> LMCacheConnectorMetadata:
    return LMCacheConnectorMetadata(
        blends=[BlendOp("request", 0, [1])] if blends else [],
        loads=[LoadOp("request", [1], 0, 1, [1])] if loads else [],
    )


def early_of(worker: Worker, steps: list[LMCacheConnectorMetadata]) -> list[bool]:
    """Run ``steps``; which of them were begun early."""
    early = []
    for meta in steps:
        worker.begin_early(meta)
        early.append(worker.has_started(meta))
        worker.run(meta)
        worker.end()
    assert list(map(id, worker.started)) == list(map(id, steps))
    return early


def test_every_step_is_started_once() -> None:
    steps = [step(), step(), step(blends=False), step()]
    assert early_of(Worker(), steps) == [False, True, False, True], "the first one tells where steps run"


def test_loads_are_begun_early_too() -> None:
    steps = [step(blends=False, loads=True), step(blends=False, loads=True), step(loads=True)]
    assert early_of(Worker(), steps) == [False, True, True]


def test_loads_layer_by_layer_wait_for_the_forward_that_asks_for_them() -> None:
    steps = [step(blends=False, loads=True), step(blends=False, loads=True), step(loads=True)]
    assert early_of(Worker(layerwise=True), steps) == [False, False, True]


def test_not_before_the_step_before_has_ended() -> None:
    worker, first, second = Worker(), step(), step()
    worker.run(first)
    worker.begin_early(second)
    assert not worker.has_started(second)
    worker.end()
    worker.run(second)
    assert worker.has_started(second)
    assert len(worker.started) == 2


def test_not_in_another_thread() -> None:
    worker, first, second = Worker(), step(), step()
    worker.run(first)
    worker.end()
    thread = threading.Thread(target=worker.begin_early, args=(second,))
    thread.start()
    thread.join()
    assert not worker.has_started(second)


def test_a_step_that_was_begun_and_never_came_is_not_taken_for_the_next() -> None:
    worker, first, lost, third = Worker(), step(), step(), step()
    worker.run(first)
    worker.end()
    worker.begin_early(lost)
    worker.run(third)
    assert list(map(id, worker.started)) == list(map(id, (first, lost, third)))


class Scheduler(SchedulerSide):
    """Notes in which order it plans."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self._trackers = {}
        self._has_sent_ahead = True
        self._asynchronous_loads = []
        begun = lambda meta: self.order.append("begin")  # noqa: E731
        self._shared = SimpleNamespace(blend_scheduling=None, begin_early=begun)  # type: ignore[assignment]

    def _plan_loads(self, meta: LMCacheConnectorMetadata, req_id: str, *_: object, **__: object) -> None:
        self.order.append(f"loads of {req_id}")
        if req_id.startswith("blend"):
            meta.blends.append(BlendOp(req_id, 0, [1]))
        if req_id.startswith("known"):
            meta.loads.append(LoadOp(req_id, [1], 0, 1, [1]))

    def _plan_saves(self, meta: LMCacheConnectorMetadata, req_id: str, *_: object) -> None:
        self.order.append(f"saves of {req_id}")


@pytest.mark.parametrize("kind", ["blend", "known"])
def test_a_step_begins_when_all_loads_are_planned_and_does_not_wait_for_saves(kind: str) -> None:
    new = [SimpleNamespace(req_id=name, block_ids=([1],), num_computed_tokens=0) for name in ("new", kind)]
    cached = SimpleNamespace(req_ids=["old"], new_block_ids=[None], num_computed_tokens=[5], resumed_req_ids=set[str]())
    counts = {"new": 3, kind: 1, "old": 1}
    scheduler = Scheduler()
    scheduler.build_connector_meta(
        SimpleNamespace(scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=counts)  # type: ignore[arg-type]
    )
    names = ("new", kind, "old")
    assert scheduler.order == [
        *(f"loads of {name}" for name in names),
        "begin",
        *(f"saves of {name}" for name in names),
    ]
