"""The public v1 interface: blending into an engine's pages, whole or layer by layer, as the library blends."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache.config import LMCacheEngineConfig
from lmcache.manager import LMCacheManager
from lmcache.metadata import LMCacheEngineMetadata
from lmcache.paging.layout import KVLayout, Plane
from lmcache.paging.token_connector import TokenConnector
from lmcache.v1.compute.blend import FusedRope, LMCBlender, LMCBlenderBuilder
from lmcache.v1.compute.blend.blender import LMCBlender as SameBlender
from lmcache.v1.compute.blend.utils import LMCBlenderBuilder as SameBuilder
from tests.blend.core.tiny_model import (
    DIM,
    KV_HEADS,
    LAYERS,
    SCALE,
    VOCAB,
    TinyHost,
    TinyModel,
    TinyRope,
    _norm,
    naive_attention,
    rotate,
)

MODEL = TinyModel()
ROPES: Any = [TinyRope()] * LAYERS
BLOCK, BLOCKS, CHUNK = 16, 40, 64


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


SYSTEM, ONE, OTHER, QUESTION = ids(32, 1), ids(96, 2), ids(96, 3), ids(9, 4)
PROMPT = torch.cat([SYSTEM, OTHER, ONE, QUESTION])


class World:
    """An engine, pages of float64, and a blender that has seen both passages behind the system prompt."""

    def __init__(self, **config: Any) -> None:
        settings = {"chunk_size": CHUNK, "blend_min_tokens": 32, "blend_policy": "kv_deviation", **config}
        self.config = LMCacheEngineConfig.from_defaults(max_local_cpu_size=0.1, enable_blending=True, **settings)
        tensors = [torch.zeros(BLOCKS, BLOCK, 2, KV_HEADS, DIM, dtype=torch.float64) for _ in range(LAYERS)]
        planes = tuple(Plane.of(tensors[0][:, :, which], tensors[0]) for which in (0, 1))
        layout = KVLayout("tiny", torch.float64, LAYERS, BLOCKS, BLOCK, KV_HEADS, DIM, planes, None)
        self.pages = TokenConnector(layout, tensors)
        shape = (LAYERS, 2, CHUNK, KV_HEADS, DIM)
        metadata = LMCacheEngineMetadata("tiny", kv_dtype=torch.float64, kv_shape=shape)
        self.manager = LMCacheManager(self.config, metadata, self.pages)
        self.slots = torch.arange(len(PROMPT)) + 3 * BLOCK
        self.blender = LMCBlender(self.manager.engine, self.pages, self.config)
        self.blender.register_model(lambda prompts: TinyHost(MODEL, prompts), ROPES)
        for passage in (ONE, OTHER):
            tokens = torch.cat([SYSTEM, passage])
            for layer, pair in enumerate(MODEL.prefill(tokens)[1]):
                self.pages.write_tokens(layer, self.pages.token_index(self.slots[:128]), (pair.k, pair.v))
            assert self.blender.store(tokens, slot_mapping=self.slots[:128]) == 128
        for tensor in tensors:
            tensor.fill_(torch.nan)

    def filled(self, layer: int) -> tuple[torch.Tensor, ...]:
        return self.pages.read_tokens(layer, self.pages.token_index(self.slots))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.manager.close()


def check_full_prefill(world: World) -> None:
    for layer, pair in enumerate(MODEL.prefill(PROMPT)[1]):
        k, v = world.filled(layer)
        torch.testing.assert_close(k, pair.k, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(v, pair.v, rtol=1e-9, atol=1e-9)


def test_the_names_are_where_callers_look_for_them() -> None:
    assert (SameBlender, SameBuilder) == (LMCBlender, LMCBlenderBuilder)
    assert callable(FusedRope.fused_encode)


def test_at_ratio_one_the_pages_hold_a_full_prefill(world: World) -> None:
    assert world.blender.blend(PROMPT, slot_mapping=world.slots, ratio=1.0) is None
    check_full_prefill(world)


def test_what_is_unknown_is_computed(world: World) -> None:
    world.manager.engine.clear()
    world.blender.blend(PROMPT.tolist(), slot_mapping=world.slots)
    check_full_prefill(world)


def test_a_blend_reuses_and_stays_close(world: World) -> None:
    world.blender.blend(PROMPT, slot_mapping=world.slots)
    k, v = world.filled(LAYERS - 1)
    full = MODEL.prefill(PROMPT)[1][LAYERS - 1]
    assert not torch.allclose(v, full.v), "something was reused"
    assert bool(torch.isfinite(k).all() and torch.isfinite(v).all()), "every page was written"


def test_leading_tokens_that_the_pages_hold_stay_as_they_are(world: World) -> None:
    pairs = MODEL.prefill(PROMPT)[1]
    for layer, pair in enumerate(pairs):
        world.pages.write_tokens(layer, world.pages.token_index(world.slots[:50]), (pair.k[:50], pair.v[:50]))
    world.blender.blend(PROMPT, torch.arange(len(PROMPT)) >= 50, slot_mapping=world.slots, ratio=1.0)
    check_full_prefill(world)


def layer_by_layer(world: World) -> tuple[torch.Tensor, SimpleNamespace]:
    """A caller that runs the model's layers itself; the hidden states of the tokens that were computed to the end."""
    metadata, hidden = SimpleNamespace(positions=None), None
    for layer in world.blender.blend_layer(PROMPT, slot_mapping=world.slots):
        rows = world.blender.rows
        if hidden is None:
            hidden = MODEL.embedding[PROMPT[rows]]
        weights, x = MODEL.layers[layer], _norm(hidden)
        q, k, v = ((x @ weights[name]).view(len(rows), -1, DIM) for name in "qkv")
        q, k = rotate(q, rows), rotate(k, rows)
        q, k, v, hidden, _, metadata = world.blender.process_qkv(q, k, v, hidden, layer, torch.empty_like(q), metadata)
        out = naive_attention(q, k, v, world.blender.rows, scale=SCALE)
        hidden = hidden + out.reshape(len(q), -1) @ weights["o"]
        hidden = hidden + torch.relu(_norm(hidden) @ weights["up"]) @ weights["down"]
    assert hidden is not None
    return hidden, metadata


@pytest.mark.parametrize("ratio", [1.0, 0.15])
def test_layer_by_layer_gives_the_pages_that_the_library_gives(ratio: float) -> None:
    whole, layers = (World(blend_recompute_ratios=ratio, blend_corrector="none") for _ in range(2))
    whole.blender.blend(PROMPT, slot_mapping=whole.slots)
    hidden, metadata = layer_by_layer(layers)
    for layer in range(LAYERS):
        for ours, theirs in zip(layers.filled(layer)[:2], whole.filled(layer)[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert len(hidden) == len(metadata.positions) < len(PROMPT) or ratio == 1.0
    whole.manager.close()
    layers.manager.close()


def test_wrong_calls_are_told(world: World) -> None:
    engine, blender = world.manager.engine, world.blender
    with pytest.raises(ValueError, match="slot_mapping: missing"):
        blender.blend(PROMPT)
    with pytest.raises(ValueError, match="kvcaches: unknown"):
        blender.blend(PROMPT, slot_mapping=world.slots, kvcaches=[])
    with pytest.raises(ValueError, match="register_model"):
        LMCBlender(engine, world.pages, world.config).blend(PROMPT, slot_mapping=world.slots)
    with pytest.raises(ValueError, match="within a step of blend_layer"):
        blender.process_qkv(*[torch.zeros(1)] * 4, 0, torch.zeros(1), None)
    with pytest.raises(ValueError, match="are not blended"):
        LMCBlender(engine, object(), world.config)  # type: ignore[arg-type]


def test_one_blender_a_name(world: World) -> None:
    engine, other = world.manager.engine, World()
    try:
        assert LMCBlenderBuilder.get("a") is None
        made = LMCBlenderBuilder.get_or_create("a", engine, world.pages, world.config)
        assert LMCBlenderBuilder.get_or_create("a", engine, world.pages, world.config) is made
        assert LMCBlenderBuilder.get("a") is made
        assert LMCBlenderBuilder.get_or_create("b", engine, world.pages, world.config) is not made
        with pytest.raises(ValueError, match="'a' exists and was made with another cache engine and connector"):
            LMCBlenderBuilder.get_or_create("a", other.manager.engine, other.pages, world.config)
        LMCBlenderBuilder.destroy("a")
        LMCBlenderBuilder.destroy("a")
        assert LMCBlenderBuilder.get("a") is None
    finally:
        LMCBlenderBuilder.destroy("b")
        other.manager.close()
