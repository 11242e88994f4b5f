"""A request waits for what another one is saving only where that pays.

Seen under a Poisson stream on an H100: prompts whose first passage lay in vLLM's own cache, but no more in ours, waited
up to five seconds for a save of it that stood in a long line, while later requests were served.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the adapter imports vLLM")

from lmcache.integration.vllm import scheduler_side
from lmcache.integration.vllm.scheduler_side import SchedulerSide
from lmcache.keys import Namespace, prefix_keys
from lmcache.observability.metrics import Metrics

pytestmark = pytest.mark.vllm

CHUNK = 4
TOKENS = list(range(20))
KEYS = prefix_keys(Namespace(model="m", kv_dtype="float32", layout="l"), TOKENS, CHUNK)


class Lease:
    """Of the first ``num_tokens``, all in host memory."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def ready(self) -> bool:
        return True

    def release(self) -> None: ...


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(scheduler_side, "time", found)
    return found


def side(held_tokens: int, saving: list[int]) -> SchedulerSide:
    """A scheduler whose store holds ``held_tokens`` of the prompt while the chunks ``saving`` are being saved."""
    under_way = {KEYS[index] for index in saving}
    engine = SimpleNamespace(
        prefix_keys=lambda *_, **__: KEYS, ask=lambda keys: None, prefetch=lambda *_, **__: Lease(held_tokens)
    )
    shared: Any = SimpleNamespace(
        engine=engine,
        config=SimpleNamespace(chunk_size=CHUNK, max_disk_wait_seconds=5.0),
        metrics=Metrics(),
        serves=True,
        failed_loads=set(),
        blends=False,
        blend_scheduling=None,
        saves=SimpleNamespace(will_hold=lambda key: key in under_way),
    )
    return SchedulerSide(shared, lambda: None)


def request() -> Any:
    return SimpleNamespace(
        request_id="a",
        num_tokens=len(TOKENS),
        num_prompt_tokens=len(TOKENS),
        all_token_ids=TOKENS,
        kv_transfer_params=None,
        lora_request=None,
        cache_salt=None,
        num_preemptions=0,
    )


def test_a_chunk_that_is_saved_in_a_moment_is_waited_for_and_not_for_long(clock: Clock) -> None:
    asked, scheduler = request(), side(held_tokens=8, saving=[2])
    assert scheduler.get_num_new_matched_tokens(asked, 0) is None
    clock.now += 0.4
    assert scheduler.get_num_new_matched_tokens(asked, 0) is None
    clock.now += 0.2
    assert scheduler.get_num_new_matched_tokens(asked, 0) == 8, "what is there is taken"


def test_what_vllm_has_itself_is_not_waited_for(clock: Clock) -> None:
    assert side(held_tokens=0, saving=[0, 1]).get_num_new_matched_tokens(request(), 8) == 0
    assert side(held_tokens=4, saving=[1]).get_num_new_matched_tokens(request(), 8) == 0


def test_what_lies_behind_vllms_own_hit_is_waited_for(clock: Clock) -> None:
    assert side(held_tokens=4, saving=[2]).get_num_new_matched_tokens(request(), 8) is None


def test_nothing_is_waited_for_that_nobody_saves(clock: Clock) -> None:
    assert side(held_tokens=8, saving=[4]).get_num_new_matched_tokens(request(), 0) == 8
