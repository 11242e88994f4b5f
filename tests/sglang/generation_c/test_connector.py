"""The connector on its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmcache.integration.sglang.generation_c.lookups import Lookups
from lmcache.integration.sglang.shared_engine import UnsupportedSetupError
from lmcache.integration.sglang.tenants import blended_key, joined, tenant_of
from tests.sglang.generation_c.small_world import CHUNK, World, small_world, wait

PROMPT = list(range(100, 170))
WHOLE = len(PROMPT) // CHUNK * CHUNK


@pytest.fixture(params=[1, 4, 16])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with small_world(monkeypatch, request.param) as made:
        yield made


def test_what_was_stored_is_loaded(world: World) -> None:
    world.stored("a", PROMPT)
    lookup, hit = world.look("b", PROMPT)
    assert hit == WHOLE
    loaded, slots = world.load(lookup, hit)
    assert loaded
    assert world.holds(PROMPT, slots)
    world.connector.finish_request("b")
    assert world.connector.open_requests == 0


def test_a_load_behind_what_is_there(world: World) -> None:
    world.stored("a", PROMPT)
    lookup, hit = world.look("b", [*PROMPT[:60], *PROMPT])
    assert hit == 48
    local = 24 // world.page_size * world.page_size
    world.connector.free_lookup_locks("b", start=0, end=local // CHUNK * CHUNK)
    loaded, slots = world.load(lookup, hit, local)
    assert loaded
    assert world.holds(PROMPT, slots, local)
    world.connector.finish_request("b")


def test_a_prompt_grows(world: World) -> None:
    """A store begins where the last one of the request ended, or where the look-up found an end."""
    assert world.connector.get_store_start("a", 64) == 0
    operation = world.store("a", PROMPT[:32])
    assert world.connector.get_store_start("a", 64) == 32
    world.connector.complete_store(operation)
    world.stored("a", PROMPT)
    lookup, hit = world.look("b", PROMPT)
    assert hit == WHOLE
    assert world.connector.get_store_start("b", 80) == WHOLE
    loaded, slots = world.load(lookup, hit)
    assert loaded
    assert world.holds(PROMPT, slots)
    world.connector.finish_request("b")


def test_what_is_looked_up_stays_until_the_request_ends(world: World) -> None:
    """The leak check of every test sees whether all of it is given back."""
    world.stored("a", PROMPT)
    for rid in ("aborted", "served elsewhere", "asked twice"):
        world.look(rid, PROMPT)
    world.look("asked twice", PROMPT)
    world.connector.submit_lookup("never polled", PROMPT, cache_salt="")
    world.connector.finish_request("aborted")
    world.connector.free_lookup_locks("served elsewhere", start=0, end=WHOLE)
    assert world.connector.open_requests == 3
    world.connector.end_all_sessions()
    assert world.connector.open_requests == 0


def test_a_request_that_waits_too_long_looks_again(world: World) -> None:
    world.stored("a", PROMPT)
    now = 0.0
    lookups = Lookups(world.connector._engine, hold_seconds=10, clock=lambda: now)
    old = lookups.start("old", PROMPT, "")
    now = 11.0
    young = lookups.start("young", PROMPT, "")
    assert old.lease is None
    assert young.lease is not None
    assert world.load(old, WHOLE)[0], "it is still held, so loading finds it"
    lookups.end("old")
    lookups.end("young")


def test_tenants_are_apart(world: World) -> None:
    for salt, key in [("a", None), (None, "a"), ("a", "a"), ("\0sglang:", None), ("\ud800", "\ud800")]:
        tenant = world.connector.build_cache_salt(salt, key)
        _, hit = world.look("x", PROMPT[:20], tenant)
        assert hit == 0
        world.stored("x", PROMPT[:20], tenant)
        assert world.look("x", PROMPT[:20], tenant)[1] == 16
        world.connector.finish_request("x")


def test_salts_as_one_string() -> None:
    pairs = [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("ab", ""), ('["a', 'b"]'), ("\0sglang:[]", "")]
    assert len({joined(*pair) for pair in pairs}) == len(pairs)
    assert joined("tenant", None) == "tenant", "as other engines call it"
    assert tenant_of(joined("a", "b")).exact
    blended = tenant_of(joined("a", blended_key("b", "request")))
    assert not blended.exact
    assert blended.salt == joined("a", "b")


def test_blended_kv_is_not_kept(world: World) -> None:
    tenant = world.connector.build_cache_salt(None, blended_key(None, "a"))
    world.stored("a", PROMPT, tenant)
    for salt in (tenant, ""):
        assert world.look("b", PROMPT, salt)[1] == 0
    world.connector.finish_request("b")


def test_from_disk_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_world(monkeypatch, local_disk=tmp_path) as first:
        first.stored("a", PROMPT)
    with small_world(monkeypatch, 16, local_disk=tmp_path) as second:
        lookup, hit = second.look("b", PROMPT)
        assert hit == WHOLE
        loaded, slots = second.load(lookup, hit)
        assert loaded
        assert second.holds(PROMPT, slots)
        assert second.connector.clear()
        assert second.look("b", PROMPT)[1] == 0
        second.connector.finish_request("b")


def test_what_is_lost_before_it_is_loaded(world: World) -> None:
    """A load of less than was promised is no load; SGLang then computes."""
    world.stored("a", PROMPT)
    lookup, hit = world.look("b", PROMPT)
    lookup.release()
    world.connector.clear()
    assert not world.load(lookup, hit)[0]
    world.connector.finish_request("b")


def test_after_the_end(world: World) -> None:
    world.stored("a", PROMPT)
    lookup, hit = world.look("b", PROMPT)
    world.connector.close()
    world.connector.close()
    assert not world.load(lookup, hit)[0]
    operation = world.store("c", PROMPT)
    wait(lambda: world.connector.ready_prefix_count([operation]) == 1)
    world.connector.complete_store(operation)
    world.connector.submit_lookup("d", PROMPT, cache_salt="")
    world.connector.finish_request("d")


def test_pages_that_do_not_divide_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="chunk_size=24: must be a multiple of SGLang's --page-size, which is 16"),
        small_world(monkeypatch, 16, chunk_size=24),
    ):
        pass


@pytest.mark.parametrize(
    "other",
    [
        {"tree_components": (SimpleNamespace(value="full"), SimpleNamespace(value="swa")), "sliding_window_size": 128},
        {"tree_components": (SimpleNamespace(value="mamba"),), "mamba_component": object()},
        {"sliding_window_size": 128},
    ],
)
def test_other_groups_are_refused(other: dict[str, object]) -> None:
    with pytest.raises(UnsupportedSetupError, match="Start SGLang without --enable-lmcache"):
        World(**other)


def test_operations_end_in_order(world: World) -> None:
    pending = [
        SimpleNamespace(future=SimpleNamespace(done=lambda done=done: done)) for done in (True, True, False, True)
    ]
    assert world.connector.ready_prefix_count(pending) == 2
    assert world.connector.ready_prefix_count([]) == 0
    alone = torch.tensor([3])
    world.connector.parallel_all_reduce(alone, torch.distributed.ReduceOp.MIN)
    assert alone.item() == 3
