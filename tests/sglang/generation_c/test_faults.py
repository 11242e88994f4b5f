"""Whatever fails below the connector: no exception leaves it, every operation ends, and nothing false is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache.cache_engine import LMCacheEngine
from lmcache.integration.sglang.generation_c.transfers import Transfers
from tests.sglang.generation_c.probe import FAULTS
from tests.sglang.generation_c.small_world import World, small_world

PROMPT = list(range(300, 370))
PLACES = {
    **FAULTS,
    "LMCacheEngine.clear": (LMCacheEngine, "clear"),
    "Transfers.load": (Transfers, "load"),
    "Transfers.store": (Transfers, "store"),
    "Transfers._retrieve": (Transfers, "_retrieve"),
}


def serve(world: World, rid: str) -> int:
    """What SGLang does with a request, from its queue to its end; how many tokens were loaded."""
    lookup, hit = world.look(rid, PROMPT)
    loaded = 0
    if hit:
        success, slots = world.load(lookup, hit)
        if success:
            assert world.holds(PROMPT, slots)
            loaded = hit
    world.stored(rid, PROMPT)
    return loaded


@pytest.mark.parametrize("place", PLACES)
def test_a_fault(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = PLACES[place]
    method = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if place == "Lookup.release":  # what the test itself does not give back is no leak of ours
            method(*args, **kwargs)
        raise RuntimeError("injected")

    with small_world(monkeypatch) as world:
        with monkeypatch.context() as failing:
            failing.setattr(owner, name, broken)
            assert serve(world, "store") == 0
            world.connector.clear()
        assert serve(world, "cold") in (0, 64)
        with monkeypatch.context() as failing:
            failing.setattr(owner, name, broken)
            serve(world, "load")
            world.connector.submit_lookup("aborted", PROMPT, cache_salt="")
            world.connector.end_all_sessions()
        assert world.failures() > 0
        assert serve(world, "after") == 64, "it has recovered"
        assert world.connector.open_requests == 0
