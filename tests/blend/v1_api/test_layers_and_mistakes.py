"""Layer by layer with every setting that narrows, callers that lose their place, and one blender for many threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lmcache.blend.lmc_blender import LMCBlender, LMCBlenderBuilder
from tests.blend.core.tiny_model import DIM, HIDDEN, KV_HEADS, LAYERS, QUERY_HEADS
from tests.blend.v1.test_lmc_blender import MODEL, PROMPT, ROPES, TinyHost, World, layer_by_layer


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.manager.close()


def zeros_for(blender: LMCBlender) -> list[torch.Tensor]:
    """q, k, v and residual of the tokens that are computed now."""
    n = len(blender.rows)
    shapes = (n, QUERY_HEADS, DIM), (n, KV_HEADS, DIM), (n, KV_HEADS, DIM), (n, HIDDEN)
    return [torch.zeros(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("corrector", ["none", "kriging"])
@pytest.mark.parametrize(
    ("check_layers", "ratios"),
    # 0.046875 of the 96 tokens that move is 4.5.
    [([1], [0.15]), ([1, 2], [0.4, 0.15]), ([1], [0.046875]), ([0, 2], [0.5, 0.1])],
)
def test_whatever_narrows_the_pages_are_those_of_the_whole_blend(
    check_layers: list[int], ratios: list[float], corrector: str
) -> None:
    settings: dict[str, Any] = {"blend_check_layers": check_layers, "blend_recompute_ratios": ratios}
    whole, layers = (World(blend_corrector=corrector, **settings) for _ in range(2))
    whole.blender.blend(PROMPT, slot_mapping=whole.slots)
    layer_by_layer(layers)
    for layer in range(LAYERS):
        for ours, theirs in zip(layers.filled(layer), whole.filled(layer), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    whole.manager.close()
    layers.manager.close()


def test_thresholds_are_refused_layer_by_layer() -> None:
    world = World(blend_thresholds=[1.0])
    with pytest.raises(ValueError, match="blend_thresholds"):
        next(world.blender.blend_layer(PROMPT, slot_mapping=world.slots))
    world.manager.close()


def test_a_layer_that_was_stepped_over_is_told(world: World) -> None:
    steps = world.blender.blend_layer(PROMPT, slot_mapping=world.slots)
    next(steps)
    with pytest.raises(ValueError, match="layer 0: its step ended without"):
        next(steps)


def test_layers_out_of_order_are_told(world: World) -> None:
    steps = world.blender.blend_layer(PROMPT, slot_mapping=world.slots)
    next(steps)
    q, k, v, residual = zeros_for(world.blender)
    with pytest.raises(ValueError, match="layer 0 is next"):
        world.blender.process_qkv(q, k, v, residual, 1, torch.zeros_like(q), None)
    steps.close()


def test_a_second_prompt_does_not_take_the_place_of_the_first(world: World) -> None:
    steps = world.blender.blend_layer(PROMPT, slot_mapping=world.slots)
    next(steps)
    with pytest.raises(ValueError, match="another prompt"):
        next(world.blender.blend_layer(PROMPT, slot_mapping=world.slots))
    assert len(world.blender.rows), "the first goes on"
    steps.close()
    next(world.blender.blend_layer(PROMPT, slot_mapping=world.slots))


def test_a_rope_too_few_is_told(world: World) -> None:
    world.blender.register_model(lambda prompts: TinyHost(MODEL, prompts), ROPES[:-1])
    with pytest.raises(ValueError, match=f"one for each of {LAYERS} layers"):
        next(world.blender.blend_layer(PROMPT, slot_mapping=world.slots))


def test_a_caller_without_an_output_of_its_own_gets_none_back(world: World) -> None:
    for layer in world.blender.blend_layer(PROMPT, slot_mapping=world.slots):
        q, k, v, _ = zeros_for(world.blender)
        q, k, v, residual, out, metadata = world.blender.process_qkv(q, k, v, None, layer, None, None)
        assert (residual, out, metadata) == (None, None, None)
        assert len(k) == len(v) == len(PROMPT)


def test_slots_that_cannot_be_written_and_empty_prompts_are_told(world: World) -> None:
    untouchable = world.slots.clone()
    untouchable[5] = -1
    for slots in (untouchable, world.slots.tolist()):
        with pytest.raises(ValueError, match="slot_mapping: expected an int64 tensor"):
            world.blender.blend(PROMPT, slot_mapping=slots)
    with pytest.raises(ValueError, match="at least one"):
        world.blender.blend([], slot_mapping=world.slots[:0])


def test_many_threads_get_one_blender(world: World) -> None:
    made: list[LMCBlender] = []

    def get() -> None:
        made.append(LMCBlenderBuilder.get_or_create("shared", world.manager.engine, world.pages, world.config))

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    LMCBlenderBuilder.destroy("shared")
    assert len(made) == 8
    assert len(set(map(id, made))) == 1
    after = LMCBlenderBuilder.get_or_create("shared", world.manager.engine, world.pages, world.config)
    LMCBlenderBuilder.destroy("shared")
    assert after is not made[0]


def test_a_built_blender_knows_the_passages_that_it_is_given(world: World) -> None:
    hosts: list[TinyHost] = []

    def host(prompts: Any) -> TinyHost:
        hosts.append(TinyHost(MODEL, prompts))
        return hosts[-1]

    blender = LMCBlenderBuilder.get_or_create(
        "given", world.manager.engine, world.pages, world.config, passages=world.blender._known
    )
    blender.register_model(host, ROPES)
    blender.blend(PROMPT, slot_mapping=world.slots)
    LMCBlenderBuilder.destroy("given")
    assert len(hosts[0].forwards[-1]) < 40, "the passage behind the exact prefix was reused"


def test_passages_that_are_learned_later_are_known_too(world: World) -> None:
    assert world.manager.passages is not None
    assert not len(world.manager.passages)
    blender = LMCBlender(world.manager.engine, world.pages, world.config, passages=world.manager.passages)
    assert blender._known is world.manager.passages
