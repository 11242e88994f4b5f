"""The connector of GPUs does what every connector does, on every layout that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache.memory.memory_obj import MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.paging import staged_connector
from lmcache.paging.layout import KVLayout
from lmcache.paging.staged_connector import StagedConnector
from lmcache.paging.token_connector import TokenConnector
from tests.kernels.needs_triton import DEVICE, require
from tests.paging.conformance import ConnectorConformance
from tests.paging.worlds import WORLDS, Sizes, World, new_chunk

require()

SIZES = Sizes(device=str(DEVICE))
LAYOUTS = sorted(
    name
    for name, world in WORLDS.items()
    if world(Sizes()).layout.planes and all(plane.strides[3] == 1 for plane in world(Sizes()).layout.planes)
)


class TestStagedConnector(ConnectorConformance):
    connector_class = StagedConnector
    worlds = LAYOUTS
    sizes = SIZES

    def test_chunks_are_token_major(self, world: World) -> None:
        assert self.connect(world).layout == TOKEN_MAJOR


class BackgroundSaves(StagedConnector):
    def __init__(self, kv_layout: KVLayout, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(kv_layout, tensors, background_saves=True)


class TestBackgroundSaves(ConnectorConformance):
    connector_class = BackgroundSaves
    worlds = LAYOUTS
    sizes = SIZES


def test_what_does_not_lie_head_by_head_is_refused() -> None:
    world = WORLDS["cpu_vec"](Sizes())
    with pytest.raises(ValueError, match="elements of a head"):
        StagedConnector(world.layout, world.tensors)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([3, 8, 20]),
    data=st.data(),
)
def test_every_byte_is_where_the_connector_of_single_tokens_puts_it(
    layout: str, dtype: torch.dtype, heads: int, dim: int, data: st.DataObject
) -> None:
    sizes = Sizes(layers=2, heads=heads, dim=dim, dtype=dtype, device=str(DEVICE))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    try:
        world = WORLDS[layout](sizes)
    except ValueError:
        return  # a shape that this layout does not come in
    slots = torch.randperm(sizes.num_slots)[:11]
    slots[torch.rand(11) < data.draw(st.sampled_from([0.0, 0.3]))] = -1
    ranges = data.draw(
        st.sampled_from([[(0, 4), (4, 11)], [(0, 4), (4, 8), (8, 11)], [(1, 6), (6, 11)], [(2, 4), (6, 8)]])
    )
    group_bytes = data.draw(st.sampled_from([1, 300, 2000, 1 << 20]))
    staged = data.draw(st.sampled_from([StagedConnector, BackgroundSaves]))
    sent_ahead = data.draw(st.sampled_from(["nothing", "these", "others"]))
    connectors = [kind(world.layout, world.tensors) for kind in (TokenConnector, staged)]
    chunks = [new_chunk(connectors[0].spec(end - start)) for start, end in ranges]
    copies = [new_chunk(connectors[0].spec(end - start)) for start, end in ranges]
    for chunk, copy in zip(chunks, copies, strict=True):
        copy.bytes.copy_(chunk.bytes)
    for connector, kept in zip(connectors, (chunks, copies), strict=True):
        with patch.object(staged_connector, "_SAVE_BYTES", group_bytes):
            connector.batched_from_gpu(kept, ranges, slots)
            connector.layer_from_gpu(1, kept, ranges, slots.flip(0))
    for chunk, copy in zip(chunks, copies, strict=True):
        assert torch.equal(chunk.tensor.view(torch.uint8), copy.tensor.view(torch.uint8))
        chunk.bytes.random_(0, 256)
        copy.bytes.copy_(chunk.bytes)
    others = [new_chunk(chunk.spec) for chunk in chunks]
    before = [tensor.clone() for tensor in world.memory]
    written = []
    for connector in connectors:
        for tensor, old in zip(world.memory, before, strict=True):
            tensor.view(torch.uint8).copy_(old.view(torch.uint8))
        with patch.object(staged_connector, "_GROUP_BYTES", group_bytes):
            if sent_ahead != "nothing":
                connector.batched_to_gpu(others, ranges, slots)
                connector.send_ahead(chunks if sent_ahead == "these" else others, ranges)
            connector.batched_to_gpu(chunks, ranges, slots)
            connector.layer_to_gpu(1, copies, ranges, slots)
        written.append(world.bytes().clone())
    assert torch.equal(*written)


class Loads:
    """A connector that may have loaded before, so that it has its staging buffers, and chunks whose bytes are alike."""

    RANGES: ClassVar = [(0, 4), (4, 8)]
    SLOTS: ClassVar = torch.arange(8)

    def __init__(self, *, before: int = 3) -> None:
        self.world = WORLDS[LAYOUTS[0]](SIZES)
        self.connector = StagedConnector(self.world.layout, self.world.tensors)
        for _ in range(before):
            self.load(self.chunks(0))

    def chunks(self, value: int) -> list[MemoryObj]:
        made = [new_chunk(self.connector.spec(end - start)) for start, end in self.RANGES]
        self.fill(made, value)
        return made

    @staticmethod
    def fill(chunks: Sequence[MemoryObj], value: int) -> None:
        for chunk in chunks:
            chunk.bytes.fill_(value)

    def send_ahead(self, chunks: Sequence[MemoryObj]) -> None:
        self.connector.send_ahead(chunks, self.RANGES)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def load(self, chunks: Sequence[MemoryObj]) -> set[int]:
        """The bytes that are in the pages then."""
        self.connector.batched_to_gpu(chunks, self.RANGES, self.SLOTS)
        there = [new_chunk(self.connector.spec(end - start)) for start, end in self.RANGES]
        self.connector.batched_from_gpu(there, self.RANGES, self.SLOTS)
        return {byte for chunk in there for byte in chunk.bytes.tolist()}


def test_what_was_sent_ahead_is_not_sent_again() -> None:
    loads = Loads()
    chunks = loads.chunks(1)
    loads.send_ahead(chunks)
    loads.fill(chunks, 2)  # nobody writes into a chunk that is held: only so is it seen which bytes were taken
    assert loads.load(chunks) == {1}
    assert loads.load(chunks) == {2}, "once: its buffer belongs to others now"


def test_what_was_sent_ahead_is_for_these_chunks_only_and_forgotten_by_the_next_load() -> None:
    loads = Loads()
    chunks, others = loads.chunks(1), loads.chunks(3)
    loads.send_ahead(chunks)
    assert loads.load(others) == {3}
    loads.fill(chunks, 2)
    assert loads.load(chunks) == {2}
    loads.send_ahead(chunks)
    loads.send_ahead(others)
    loads.fill([*chunks, *others], 4)
    assert loads.load(chunks) == {4}
    assert loads.load(others) == {4}


def test_chunks_that_were_given_back_are_not_taken_for_those_that_came_after_them() -> None:
    loads = Loads()
    chunks = loads.chunks(1)
    loads.send_ahead(chunks)
    for chunk in chunks:
        chunk.ref_down()
    assert loads.load(loads.chunks(2)) == {2}


@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_a_part_may_be_sent_ahead(group_bytes: int) -> None:
    loads = Loads()
    chunks = loads.chunks(1)
    with patch.object(staged_connector, "_GROUP_BYTES", group_bytes):
        loads.load(chunks)
        loads.send_ahead(chunks)
        loads.fill(chunks, 2)
        assert loads.load(chunks) == ({1, 2} if group_bytes == 1 else {1})


def test_chunks_that_lie_apart_do_not_share_what_was_sent_ahead_for_the_first() -> None:
    loads = Loads()
    chunks = loads.chunks(1)
    loads.fill(chunks[1:], 2)
    with patch.object(staged_connector, "_GROUP_BYTES", 1):
        loads.load(chunks)
        loads.send_ahead(chunks)
        apart = [(0, 4), (5, 9)]
        slots = torch.arange(9)
        loads.connector.batched_to_gpu(chunks, apart, slots)
    there = [new_chunk(loads.connector.spec(4)) for _ in apart]
    loads.connector.batched_from_gpu(there, apart, slots)
    assert [set(chunk.bytes.tolist()) for chunk in there] == [{1}, {2}]


def test_nothing_is_sent_ahead_while_there_is_no_room() -> None:
    loads = Loads(before=0)
    chunks = loads.chunks(1)
    loads.send_ahead(chunks)  # no load has made the buffers yet
    loads.fill(chunks, 2)
    assert loads.load(chunks) == {2}

    loads = Loads()
    chunks = loads.chunks(2)
    with loads.connector._in.lock:  # a load is being queued in another thread
        loads.send_ahead(chunks)
    loads.fill(chunks, 3)
    assert loads.load(chunks) == {3}
