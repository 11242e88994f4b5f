"""The connector of GPUs does what every connector does, on every layout that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    before = [tensor.clone() for tensor in world.memory]
    written = []
    for connector in connectors:
        for tensor, old in zip(world.memory, before, strict=True):
            tensor.view(torch.uint8).copy_(old.view(torch.uint8))
        with patch.object(staged_connector, "_GROUP_BYTES", group_bytes):
            connector.batched_to_gpu(chunks, ranges, slots)
            connector.layer_to_gpu(1, copies, ranges, slots)
        written.append(world.bytes().clone())
    assert torch.equal(*written)
