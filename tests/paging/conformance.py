"""What every connector must do. A connector's test class inherits this and says how it is built.

The property test over all of them stands in test_connectors.py: hypothesis wants one function, not one a class.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from lmcache.memory.memory_obj import MemoryObj
from lmcache.paging.paged_connector import PagedConnector
from tests.paging.worlds import WORLDS, Sizes, World, new_chunk


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def slots_of(blocks: list[int], block_size: int, tokens: int) -> torch.Tensor:
    table = torch.tensor(blocks, dtype=torch.int64)
    return (table[:, None] * block_size + torch.arange(block_size)).flatten()[:tokens]


class ConnectorConformance:
    connector_class: ClassVar[type[PagedConnector]]
    worlds: ClassVar[list[str]]
    sizes = Sizes()
    chunk_size = 8
    slots = slots_of([4, 1, 3, 2], 4, 13)
    ranges: ClassVar[list[tuple[int, int]]] = [(0, 8), (8, 13)]

    @pytest.fixture
    def world(self, request: pytest.FixtureRequest) -> World:
        torch.manual_seed(1)
        return WORLDS[request.param](self.sizes)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "world" in metafunc.fixturenames:
            metafunc.parametrize("world", self.worlds, indirect=True)

    def connect(self, world: World) -> PagedConnector:
        return self.connector_class(world.layout, world.tensors)

    def gathered(self, connector: PagedConnector) -> list[MemoryObj]:
        objs = [new_chunk(connector.spec(end - start)) for start, end in self.ranges]
        connector.batched_from_gpu(objs, self.ranges, self.slots)
        return objs

    def test_chunk_views_show_every_token(self, world: World) -> None:
        connector = self.connect(world)
        before = world.bytes()
        objs = self.gathered(connector)
        assert torch.equal(world.bytes(), before)
        for obj, (start, end) in zip(objs, self.ranges, strict=True):
            views = connector.chunk_views(obj)
            assert len(views) == world.num_planes
            for plane, view in enumerate(views):
                per_block = view.shape[2]
                for layer in range(world.sizes.layers):
                    for token in range(end - start):
                        seen = view[layer, token // per_block, token % per_block]
                        expected = world.token(layer, plane, int(self.slots[start + token]))
                        assert torch.equal(as_bytes(seen.cpu()), as_bytes(expected.cpu())), (plane, layer, token)

    def test_spec_and_layout(self, world: World) -> None:
        connector = self.connect(world)
        spec = connector.spec(5)
        assert spec.layout == connector.layout
        assert spec.dtype == world.sizes.dtype
        assert spec.num_tokens == 5
        assert spec.shape[0] == connector.num_layers == world.sizes.layers

    def test_layer_by_layer_is_all_at_once(self, world: World) -> None:
        connector = self.connect(world)
        at_once = self.gathered(connector)
        objs = [new_chunk(obj.spec) for obj in at_once]
        for layer in range(connector.num_layers):
            connector.layer_from_gpu(layer, objs, self.ranges, self.slots)
        for a, b in zip(at_once, objs, strict=True):
            assert torch.equal(a.bytes, b.bytes)

        for memory in world.memory:
            memory.view(torch.uint8).fill_(0x5A)
        connector.batched_to_gpu(objs, self.ranges, self.slots)
        expected = world.bytes()
        for memory in world.memory:
            memory.view(torch.uint8).fill_(0x5A)
        for layer in range(connector.num_layers):
            connector.layer_to_gpu(layer, objs, self.ranges, self.slots)
        assert torch.equal(world.bytes(), expected)

    def test_one_layer_touches_one_layer(self, world: World) -> None:
        connector = self.connect(world)
        objs = [new_chunk(connector.spec(8))]
        before = objs[0].tensor.view(torch.uint8).clone()
        connector.layer_from_gpu(1, objs, [(0, 8)], self.slots)
        after = objs[0].tensor.view(torch.uint8)
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[2], before[2])
        assert not torch.equal(after[1], before[1])

    def test_all_holes_and_no_chunks_move_nothing(self, world: World) -> None:
        connector = self.connect(world)
        obj = new_chunk(connector.spec(8))
        chunk, pages = obj.padded_bytes.clone(), world.bytes()
        holes = torch.full((8,), -1)
        connector.to_gpu(obj, 0, 8, holes)
        connector.from_gpu(obj, 0, 8, holes)
        connector.batched_to_gpu([], [], holes)
        assert torch.equal(obj.padded_bytes, chunk)
        assert torch.equal(world.bytes(), pages)

    @pytest.mark.parametrize(
        ("start", "end", "slot", "message"),
        [
            (0, 14, 0, "slot mapping of 13"),
            (4, 4, 0, r"range \[4, 4\)"),
            (-1, 4, 0, r"range \[-1, 4\)"),
            (0, 7, 0, "chunk of"),
            (0, 8, 24, r"0 … 23, got .* … 24"),
            (0, 8, -2, "got -2"),
        ],
    )
    def test_bad_arguments_move_nothing(self, world: World, start: int, end: int, slot: int, message: str) -> None:
        connector = self.connect(world)
        obj, good = new_chunk(connector.spec(8)), new_chunk(connector.spec(8))
        slots = self.slots.clone()
        if slot:
            slots[3] = slot
        before = world.bytes()
        held = good.bytes.clone()
        good_range = (0, 8) if not slot else (5, 13)
        with pytest.raises(ValueError, match=message):
            connector.batched_to_gpu([good, obj], [good_range, (start, end)], slots)
        with pytest.raises(ValueError, match=message):
            connector.batched_from_gpu([good, obj], [good_range, (start, end)], slots)
        assert torch.equal(world.bytes(), before)
        assert torch.equal(good.bytes, held)

    def test_wrong_layer_and_uneven_lists(self, world: World) -> None:
        connector = self.connect(world)
        obj = new_chunk(connector.spec(8))
        with pytest.raises(ValueError, match="layer 3 of 3"):
            connector.layer_to_gpu(3, [obj], [(0, 8)], self.slots)
        with pytest.raises(ValueError, match="1 chunks for 2 ranges"):
            connector.batched_to_gpu([obj], [(0, 8), (8, 13)], self.slots)
