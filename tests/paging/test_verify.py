from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmcache.paging.detect import UnknownLayoutError
from lmcache.paging.verify import verify_layout
from tests.paging.worlds import DTYPES, WORLDS, Sizes, World


def writer_of(world: World, scale: float = 1.0):  # type: ignore[no-untyped-def]
    """The engine's own writer, token by token. fp8 pages get scaled and rounded numbers."""

    def write(layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        for token, slot in enumerate(slots.tolist()):
            for plane in range(world.num_planes):
                value = (k, v)[plane][token]
                place = world.token(layer, plane, slot)
                if place.dtype == torch.uint8:
                    place.copy_((value.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8))
                elif place.dtype.itemsize == 1:
                    place.copy_((value.float() / scale).to(place.dtype))
                else:
                    place.copy_(value)

    return write


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(WORLDS))
def test_right_layouts_pass_and_the_pages_stay(name: str, dtype: torch.dtype) -> None:
    world = WORLDS[name](Sizes(dtype=dtype))
    before = world.bytes()
    assert verify_layout(world.layout, world.tensors, writer_of(world)) is world.layout
    assert torch.equal(world.bytes(), before)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_fp8_with_a_scale(scale: float) -> None:
    world = WORLDS["kv_second_nhd"](Sizes(dtype=torch.float8_e4m3fn))
    assert verify_layout(world.layout, world.tensors, writer_of(world, scale)) is world.layout


def swapped(world: World) -> World:
    k, v = world.layout.planes
    return replace(world, layout=replace(world.layout, planes=(v, k)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["kv_first", "plain", "kv_pools", "kv_last_heads_outermost"])
def test_k_and_v_exchanged(name: str, dtype: torch.dtype) -> None:
    world = swapped(WORLDS[name](Sizes(dtype=dtype)))
    with pytest.raises(
        UnknownLayoutError, match=r"layer 0 are not laid out as .*K written by the engine did not appear"
    ):
        verify_layout(world.layout, world.tensors, writer_of(world))


def test_a_wrong_layer_in_the_middle() -> None:
    world = WORLDS["kv_first"](Sizes())
    write = writer_of(world)

    def other_layer(layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        write(2 if layer == 1 else layer, k, v, slots)

    with pytest.raises(UnknownLayoutError, match="KV pages of layer 1"):
        verify_layout(world.layout, world.tensors, other_layer)


def test_a_writer_that_touches_other_tokens() -> None:
    world = WORLDS["kv_first"](Sizes())
    write = writer_of(world)

    def spills(layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        for block in set((slots // 4).tolist()):
            for slot in range(4 * block, 4 * block + 4):
                world.token(layer, 0, slot).zero_()
        write(layer, k, v, slots)

    with pytest.raises(UnknownLayoutError, match="writing some tokens changed the K of others"):
        verify_layout(world.layout, world.tensors, spills)


class TestPacking:
    def packing_writer(self, world: World, shift: int = 1):  # type: ignore[no-untyped-def]
        """Writes K and V in their page, but rolled by ``shift`` elements."""
        layout = world.layout
        pages = [layout.page_view(world.tensors, layer) for layer in range(layout.num_layers)]
        write = writer_of(world)

        def roll(layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
            for block in set((slots // layout.block_size).tolist()):
                pages[layer][block] = pages[layer][block].roll(-shift)
            write(layer, k, v, slots)
            for block in set((slots // layout.block_size).tolist()):
                pages[layer][block] = pages[layer][block].roll(shift)

        return roll

    def test_pages_packed_in_an_unknown_way_move_whole(self) -> None:
        world = WORLDS["cpu_vec"](Sizes())
        before = world.bytes()
        packed = verify_layout(world.layout, world.tensors, self.packing_writer(world))
        assert packed.packed
        assert packed.page == world.layout.page
        assert torch.equal(world.bytes(), before)

    def test_the_tag_tells_packings_apart_and_does_not_depend_on_the_pages(self) -> None:
        tags = []
        for blocks, shift in ((6, 1), (9, 1), (6, 2)):
            world = WORLDS["cpu_vec"](Sizes(blocks=blocks))
            tags.append(verify_layout(world.layout, world.tensors, self.packing_writer(world, shift)).page_tag)
        assert tags[0] == tags[1]
        assert tags[0] != tags[2]

    def test_a_packed_layout_can_be_proved_again(self) -> None:
        world = WORLDS["cpu_vec"](Sizes())
        write = self.packing_writer(world)
        packed = verify_layout(world.layout, world.tensors, write)
        assert verify_layout(packed, world.tensors, write) == packed

    def test_a_token_outside_of_its_page(self) -> None:
        world = WORLDS["cpu_vec"](Sizes())
        write = writer_of(world)
        with pytest.raises(UnknownLayoutError, match=r"the tokens of a block do not fill its page\..*K written"):
            verify_layout(world.layout, world.tensors, lambda layer, k, v, slots: write(layer, k, v, slots - 1))

    def test_a_block_that_also_changes_another_page(self) -> None:
        world = WORLDS["cpu_vec"](Sizes())
        write = self.packing_writer(world)
        pages = world.layout.page_view(world.tensors, 0)

        def spills(layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
            write(layer, k, v, slots)
            pages[3].fill_(float(k.flatten()[0]))

        with pytest.raises(UnknownLayoutError, match="also change another page"):
            verify_layout(world.layout, world.tensors, spills)

    def test_a_writer_that_does_nothing(self) -> None:
        world = WORLDS["cpu_vec"](Sizes())
        with pytest.raises(UnknownLayoutError, match="do not fill its page"):
            verify_layout(world.layout, world.tensors, lambda layer, k, v, slots: None)
