"""SGLang's forwards run on a stream of their own, and are still under way when it calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.sglang.generation_c.small_world import World, small_world, wait

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

PROMPT = list(range(500, 564))
LONG = 300_000_000  # cycles: about 0.2 s


class Scheduler:
    """As far as the connector looks for one among its callers."""

    tp_worker = server_args = None

    def __init__(self, forward_stream: torch.cuda.Stream | None) -> None:
        self.forward_stream = forward_stream

    def build(self, page_size: int) -> World:
        return World(page_size, "cuda")


@pytest.fixture(params=[True, False], ids=["stream known", "stream unknown"])
def forward_stream(request: pytest.FixtureRequest) -> tuple[torch.cuda.Stream, bool]:
    return torch.cuda.Stream(), request.param


@pytest.fixture
def world(forward_stream: tuple[torch.cuda.Stream, bool], monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    stream, known = forward_stream
    with small_world(monkeypatch, make=Scheduler(stream if known else None).build) as made:
        yield made


def test_a_store_waits_for_the_forward_that_writes_its_slots(
    world: World, forward_stream: tuple[torch.cuda.Stream, bool]
) -> None:
    forward, schedule = forward_stream[0], torch.cuda.Stream()
    kv, slots = world.kv(PROMPT), world.slots(len(PROMPT))
    torch.cuda.synchronize()
    with torch.cuda.stream(schedule):
        torch.cuda._sleep(LONG)
        indices = slots + 0  # computed late, as SGLang's are
        with torch.cuda.stream(forward):
            torch.cuda._sleep(2 * LONG)
            world.write(kv, slots)
        operation = world.connector.submit_store("a", PROMPT, [indices], device_indices_start=0)
    world.connector.complete_store(operation)
    lookup, hit = world.look("b", PROMPT)
    assert hit == len(PROMPT)
    loaded, at = world.load(lookup, hit)
    assert loaded
    torch.cuda.synchronize()
    assert world.holds(PROMPT, at)
    world.connector.finish_request("a")
    world.connector.finish_request("b")


def test_a_load_waits_for_the_forward_before_and_the_next_one_for_it(
    world: World, forward_stream: tuple[torch.cuda.Stream, bool]
) -> None:
    forward, schedule = forward_stream[0], torch.cuda.Stream()
    world.stored("a", PROMPT)
    lookup, hit = world.look("b", PROMPT)
    slots = world.slots(hit)
    false, expected = torch.full_like(world.kv(PROMPT), 99), world.kv(PROMPT)
    torch.cuda.synchronize()
    with torch.cuda.stream(schedule):
        torch.cuda._sleep(LONG)
        indices = slots + 0
        with torch.cuda.stream(forward):
            torch.cuda._sleep(2 * LONG)
            world.write(false, slots)  # a request that was given up, and its slots with it
        load = world.connector.submit_load(
            lookup, [indices], local_hit_tokens=0, owned_device_indices=indices, producer_stream=forward
        )
        assert world.connector.prepare_load_on_stream(load, forward)
    with torch.cuda.stream(forward):
        seen = [pool[slots].clone() for pool in (*world.keys, *world.values)]
    torch.cuda.synchronize()
    layers = len(world.keys)
    for plane in range(2):
        for layer in range(layers):
            assert torch.equal(seen[plane * layers + layer], expected[layer, plane])
    wait(lambda: world.connector.ready_prefix_count([load]) == 1)
    assert world.connector.complete_load(load)
    world.connector.finish_request("b")
