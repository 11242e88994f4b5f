from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.metadata import TOKEN_MAJOR
from lmcache.paging.block_connector import BlockConnector
from lmcache.paging.make_connector import make_connector
from lmcache.paging.token_connector import TokenConnector
from tests.paging.conformance import ConnectorConformance, as_bytes, slots_of
from tests.paging.worlds import DTYPES, WHOLE_PAGES, WORLDS, Sizes, World, cpu_vec, kv_second_nhd, new_chunk


class TestTokenConnector(ConnectorConformance):
    connector_class = TokenConnector
    worlds = sorted(WORLDS)

    def test_chunks_are_token_major(self, world: World) -> None:
        connector = self.connect(world)
        heads = world.layout.num_heads
        assert connector.spec(5).shape == (3, world.num_planes, 5, heads, world.sizes.dim)
        assert connector.layout == TOKEN_MAJOR

    def test_gathering_holes_leaves_their_place_alone(self, world: World) -> None:
        connector = self.connect(world)
        obj = new_chunk(connector.spec(8))
        before = obj.tensor.view(torch.uint8).clone()
        slots = self.slots.clone()
        slots[[2, 5]] = -1
        connector.from_gpu(obj, 0, 8, slots)
        after = obj.tensor.view(torch.uint8)
        assert torch.equal(after[:, :, [2, 5]], before[:, :, [2, 5]])
        assert not torch.equal(after[:, :, 3], before[:, :, 3])


class TestBlockConnector(ConnectorConformance):
    connector_class = BlockConnector
    worlds = WHOLE_PAGES

    def test_chunks_are_the_engines_bytes(self, world: World) -> None:
        connector = self.connect(world)
        obj = self.gathered(connector)[0]
        for layer in range(3):
            for page, block in enumerate([4, 1]):
                assert torch.equal(
                    as_bytes(obj.tensor[layer, page]),
                    as_bytes(world.layout.page_view(world.tensors, layer)[block]),
                )

    def test_tag_names_layout_and_block_size(self, world: World) -> None:
        connector = self.connect(world)
        assert world.layout.name in connector.layout
        assert ":4x" in connector.layout
        assert connector.layout != TOKEN_MAJOR


@pytest.mark.parametrize("threads", [1, 2])
def test_scatter_is_the_same_on_one_thread_and_on_more(threads: int) -> None:
    old = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        TestBlockConnector().test_layer_by_layer_is_all_at_once(cpu_vec(Sizes()))
    finally:
        torch.set_num_threads(old)


def test_no_two_layouts_share_a_tag() -> None:
    tags = [
        WORLDS[name](Sizes(block_size=size)).layout.page_tag
        for name in WHOLE_PAGES
        if name not in ("kv_last_blocks_outermost", "mla_4d")  # pages like those of kv_last_hnd and mla_3d
        for size in (4, 8)
    ]
    assert len(set(tags)) == len(tags)


def test_k_and_v_exchanged_is_another_tag() -> None:
    layout = WORLDS["kv_second_nhd"](Sizes()).layout
    assert layout.page_tag != replace(layout, planes=layout.planes[::-1]).page_tag


@st.composite
def moves(draw: st.DrawFn, whole_pages: bool) -> tuple[Sizes, str, int, torch.Tensor, torch.Tensor]:
    """Sizes, world, chunk size, and the slots of some tokens in one set of pages and in another."""
    size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    sizes = Sizes(
        layers=draw(st.integers(1, 3)),
        blocks=draw(st.integers(3, 7)),
        block_size=size,
        heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([1, 3, 8, 16])),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    name = draw(st.sampled_from(WHOLE_PAGES if whole_pages else sorted(WORLDS)))
    chunk_size = draw(st.one_of(st.integers(1, 40), st.integers(1, 3).map(lambda pages: pages * size)))
    tokens = draw(st.integers(1, sizes.num_slots))
    tables = [draw(st.permutations(range(sizes.blocks))) for _ in range(2)]
    source, target = (slots_of(table, size, tokens) for table in tables)
    if draw(st.booleans()):  # no engine does this, but nothing forbids it
        order = torch.tensor(draw(st.permutations(range(tokens))))
        source, target = source[order], target[order]
    holes = draw(st.lists(st.tuples(st.integers(0, tokens), st.integers(0, tokens)), max_size=3))
    for start, end in holes:
        target[start:end] = -1
    return sizes, name, chunk_size, source, target


def check_move(connector_class: type[TokenConnector | BlockConnector], move: tuple) -> None:  # type: ignore[type-arg]
    sizes, name, chunk_size, source, target = move
    old, new, expected = (WORLDS[name](sizes) for _ in range(3))
    for memory, same in zip(new.memory, expected.memory, strict=True):
        same.copy_(memory)
    assert torch.equal(new.bytes(), expected.bytes())
    tokens = len(source)
    ranges = [(start, min(start + chunk_size, tokens)) for start in range(0, tokens, chunk_size)][::-1]

    reader = connector_class(old.layout, old.tensors)
    objs = [new_chunk(reader.spec(end - start)) for start, end in ranges]
    padding = [obj.padded_bytes[obj.spec.nbytes :].clone() for obj in objs]
    before = old.bytes()
    reader.batched_from_gpu(objs, ranges, source)
    assert torch.equal(old.bytes(), before)
    assert all(torch.equal(obj.padded_bytes[obj.spec.nbytes :], pad) for obj, pad in zip(objs, padding, strict=True))

    connector_class(new.layout, new.tensors).batched_to_gpu(objs, ranges, target)
    for token, slot in enumerate(target.tolist()):
        if slot >= 0:
            for layer in range(sizes.layers):
                for plane in range(old.num_planes):
                    expected.token(layer, plane, slot).copy_(old.token(layer, plane, int(source[token])))
    assert torch.equal(new.bytes(), expected.bytes())


@given(moves(whole_pages=False))
@settings(max_examples=250, deadline=None)
def test_tokens_go_from_pages_to_other_pages(move: tuple) -> None:  # type: ignore[type-arg]
    check_move(TokenConnector, move)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@given(moves(whole_pages=False))
@settings(max_examples=100, deadline=None)
def test_tokens_go_from_pages_to_other_pages_on_a_gpu(move: tuple) -> None:  # type: ignore[type-arg]
    sizes, *rest = move
    check_move(TokenConnector, (replace(sizes, device="cuda"), *rest))


@given(moves(whole_pages=True))
@settings(max_examples=250, deadline=None)
def test_pages_go_to_other_pages(move: tuple) -> None:  # type: ignore[type-arg]
    check_move(BlockConnector, move)


def test_how_far_layers_lie_apart() -> None:
    world = kv_second_nhd(Sizes())
    memory = torch.zeros(3, *world.tensors[0].shape, dtype=world.layout.dtype)
    connector = TokenConnector(world.layout, list(memory))
    size = memory[0].numel()
    assert connector.layer_distances == (0, size, 2 * size)
    assert connector.distances_on_device is not None
    assert connector.distances_on_device.tolist() == [0, size, 2 * size]
    backwards = TokenConnector(world.layout, list(memory)[::-1])
    assert backwards.layer_distances == (0, -size, -2 * size)


def test_k_and_v_that_lie_apart_otherwise_have_no_one_distance() -> None:
    world = kv_second_nhd(Sizes())
    connector = TokenConnector(world.layout, world.tensors)
    first, (k, v), last = connector.planes
    connector.planes = [first, (v, k), last]
    assert connector.layer_distances is None
    assert connector.distances_on_device is None


class TestPackedPages:
    """Pages whose tokens cannot be told apart go whole or not at all."""

    def world(self) -> World:
        world = cpu_vec(Sizes())
        return replace(world, layout=replace(world.layout, name="packed", planes=(), packing="abc"))

    def test_whole_pages_come_back(self) -> None:
        world = self.world()
        connector = BlockConnector(world.layout, world.tensors)
        obj = new_chunk(connector.spec(6))
        pages = world.memory[0]
        source = pages[:, [4, 1]].clone()
        connector.from_gpu(obj, 0, 6, slots_of([4, 1], 4, 6))
        expected = pages.clone()
        expected[:, [0, 5]] = source
        connector.to_gpu(obj, 0, 6, slots_of([0, 5], 4, 6))
        assert torch.equal(as_bytes(pages), as_bytes(expected))

    def test_pages_that_are_computed_already_stay(self) -> None:
        world = self.world()
        connector = BlockConnector(world.layout, world.tensors)
        obj = new_chunk(connector.spec(8))
        slots = slots_of([4, 1], 4, 8)
        slots[:4] = -1
        before = world.memory[0].clone()
        connector.to_gpu(obj, 0, 8, slots)
        assert torch.equal(as_bytes(world.memory[0][:, [0, 2, 3, 4, 5]]), as_bytes(before[:, [0, 2, 3, 4, 5]]))
        assert torch.equal(as_bytes(world.memory[0][:, 1].reshape(3, -1)), as_bytes(obj.tensor[:, 1]))

    def test_half_a_page_is_refused_before_anything_moves(self) -> None:
        world = self.world()
        connector = BlockConnector(world.layout, world.tensors)
        obj = new_chunk(connector.spec(8))
        slots = slots_of([4, 1], 4, 8)
        slots[:2] = -1
        before = world.bytes()
        with pytest.raises(ValueError, match=r"packs its pages of 4 tokens: a chunk must begin at a page"):
            connector.to_gpu(obj, 0, 8, slots)
        assert torch.equal(world.bytes(), before)

    def test_single_tokens_cannot_be_had(self) -> None:
        world = self.world()
        with pytest.raises(ValueError, match="packs its pages"):
            TokenConnector(world.layout, world.tensors)
        with pytest.raises(ValueError, match="packs its pages"):
            BlockConnector(world.layout, world.tensors).chunk_views(new_chunk(self.spec(world)))
        with pytest.raises(ValueError, match=r"chunk_size=6 must be a multiple of the engine's block size 4"):
            make_connector(world.layout, world.tensors, 6)

    def spec(self, world: World):  # type: ignore[no-untyped-def]
        return BlockConnector(world.layout, world.tensors).spec(8)

    def test_the_packing_is_part_of_the_tag(self) -> None:
        layout = self.world().layout
        assert layout.page_tag != replace(layout, packing="def").page_tag


class TestMakeConnector:
    @pytest.mark.parametrize("name", sorted(WORLDS))
    def test_whole_pages_where_there_are_any(self, name: str) -> None:
        world = WORLDS[name](Sizes())
        connector = make_connector(world.layout, world.tensors, 8)
        assert type(connector) is (BlockConnector if name in WHOLE_PAGES else TokenConnector)

    def test_chunks_that_cut_pages_are_token_major(self) -> None:
        world = cpu_vec(Sizes())
        assert type(make_connector(world.layout, world.tensors, 6)) is TokenConnector

    def test_pages_on_a_device_are_token_major(self) -> None:
        world = cpu_vec(Sizes())
        on_device = [tensor.to("meta") for tensor in world.tensors]
        assert type(make_connector(world.layout, on_device, 8)) is TokenConnector
        with pytest.raises(ValueError, match="pages on the CPU only, these are on meta"):
            BlockConnector(world.layout, on_device)

    def test_layers_of_one_storage_are_copied_at_once(self) -> None:
        world = cpu_vec(Sizes())
        assert BlockConnector(world.layout, world.tensors)._stacked is not None
        apart = [tensor.clone() for tensor in world.tensors]
        assert BlockConnector(world.layout, apart)._stacked is None
        TestBlockConnector().test_layer_by_layer_is_all_at_once(replace(world, tensors=apart, memory=apart))
