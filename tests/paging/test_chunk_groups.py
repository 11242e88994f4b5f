"""Chunks are cut into groups that fit, and every byte of them is in exactly one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.memory.memory_obj import KVSpec
from lmcache.metadata import TOKEN_MAJOR
from lmcache.paging.chunk_groups import UniformChunks
from tests.paging.worlds import new_chunk

ROW = 4


def chunks(sizes: list[int], layers: int) -> UniformChunks | None:
    objs = [new_chunk(KVSpec((layers, 1, size, 1, ROW), torch.uint8, TOKEN_MAJOR, size)) for size in sizes]
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return UniformChunks.of(objs, [(end - size, end) for end, size in zip(ends, sizes, strict=True)], ROW)


@given(full=st.integers(1, 5), size=st.integers(1, 4), rest=st.integers(0, 3), layers=st.integers(1, 6), data=st.data())
def test_every_layer_of_every_chunk_is_in_one_group(
    full: int, size: int, rest: int, layers: int, data: st.DataObject
) -> None:
    sizes = [size] * full + [min(rest, size)] * (rest > 0)
    found = chunks(sizes, layers)
    assert found is not None
    most = data.draw(st.integers(1, 200))
    asked = range(data.draw(st.integers(0, layers - 1)), layers)
    seen = []
    for group in found.groups(asked, most):
        one = len(group.chunks) == len(group.layers) == 1
        assert one or len(group.chunks) * len(group.layers) * found.layer_bytes <= most
        first, tokens = found.tokens_of(group)
        assert (first, first + tokens) == (sum(sizes[: group.chunks.start]), sum(sizes[: group.chunks.stop]))
        seen += [(layer, chunk) for layer in group.layers for chunk in group.chunks]
    assert sorted(seen) == [(layer, chunk) for layer in asked for chunk in range(len(sizes))]


def test_addresses_are_those_of_the_shares() -> None:
    found = chunks([3, 3, 2], 4)
    assert found is not None
    for group in found.groups(range(1, 4), 2 * 3 * 3 * ROW):
        target, source, sizes = found.addresses(group, 1000)
        shares = found.shares(group)
        assert source.tolist() == [share.data_ptr() for share in shares]
        assert sizes.tolist() == [len(share) for share in shares]
        room = len(group.layers) * found.layer_bytes
        assert target.tolist() == [1000 + index * room for index in range(len(shares))]


def test_chunks_that_are_not_alike_are_no_group() -> None:
    assert chunks([3, 2, 3], 1) is None
    assert chunks([2, 3], 1) is None
    objs = [new_chunk(KVSpec((1, 1, 2, 1, ROW), torch.uint8, TOKEN_MAJOR, 2)) for _ in range(2)]
    assert UniformChunks.of(objs, [(0, 2), (4, 6)], ROW) is None
