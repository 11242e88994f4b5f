"""Chunks of other shards, against plain slices of the whole model's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.keys import CacheKey, Namespace, Shard, prefix_keys
from lmcache.memory.memory_obj import KVSpec
from lmcache.metadata import TOKEN_MAJOR
from lmcache.storage.cpu import LocalCPUTier
from lmcache.storage.resharded import ReshardedTier, ShardSource
from lmcache.storage.shard_recipes import recipes

HEADS = 8
SIZES = [1, 2, 4, 8]


def namespace(shard: Shard) -> Namespace:
    return Namespace("model", "float32", TOKEN_MAJOR, **shard._asdict())


def key_of(number: int, shard: Shard) -> CacheKey:
    return prefix_keys(namespace(shard), [number], 1)[0]


def whole(number: int, num_tokens: int = 3) -> torch.Tensor:
    """``[layers, planes, tokens, heads, dim]`` of all heads."""
    return torch.randn(2, 2, num_tokens, HEADS, 4, generator=torch.Generator().manual_seed(number))


def part(number: int, shard: Shard) -> torch.Tensor:
    return whole(number).chunk(shard.tp_size, dim=3)[shard.tp_rank]


def put(tier: LocalCPUTier, number: int, shard: Shard, *, layout: str = TOKEN_MAJOR) -> None:
    tensor = part(number, shard)
    obj = tier.allocate(KVSpec(tuple(tensor.shape), tensor.dtype, layout, tensor.shape[2]))
    assert obj is not None
    with obj:
        obj.tensor.copy_(tensor)
        assert tier.submit_put(key_of(number, shard), obj)


@pytest.fixture
def memory() -> Iterator[LocalCPUTier]:
    tier = LocalCPUTier(4 << 20, slab_bytes=1 << 20, pin_memory=False)
    yield tier
    tier.close()


def all_shards(sizes: list[int]) -> list[Shard]:
    return [Shard(rank, size) for size in sizes for rank in range(size)]


@given(own=st.sampled_from(all_shards(SIZES)), kept=st.sampled_from(SIZES))
@settings(max_examples=60, deadline=None)
def test_every_size_is_made_out_of_every_other(own: Shard, kept: int) -> None:
    memory = LocalCPUTier(4 << 20, slab_bytes=1 << 20, pin_memory=False)
    for shard in all_shards([kept]):
        put(memory, 7, shard)
    tier = ReshardedTier(own, [ShardSource(shard, memory) for shard in all_shards([kept])], memory.allocate)
    assert tier.contains(key_of(7, own))
    assert not tier.contains(key_of(8, own))
    assert tier.submit_get(key_of(8, own)).result(10) is None
    obj = tier.submit_get(key_of(7, own)).result(10)
    assert obj is not None
    with obj:
        assert obj.spec.num_tokens == 3
        assert torch.equal(obj.tensor, part(7, own))
    tier.close()


def test_a_part_that_is_missing_is_a_miss(memory: LocalCPUTier) -> None:
    own, shards = Shard(0, 1), all_shards([2])
    tier = ReshardedTier(own, [ShardSource(shard, memory) for shard in shards], memory.allocate)
    put(memory, 1, shards[0])
    assert not tier.contains(key_of(1, own))
    assert tier.submit_get(key_of(1, own)).result(10) is None
    put(memory, 1, shards[1])
    assert tier.contains(key_of(1, own))


def test_bytes_in_another_layout_are_a_miss(memory: LocalCPUTier) -> None:
    own, other = Shard(0, 2), Shard(0, 1)
    put(memory, 1, other, layout="pages-1:some")
    tier = ReshardedTier(own, [ShardSource(other, memory)], memory.allocate)
    assert tier.submit_get(key_of(1, own)).result(10) is None
    assert tier.stats().failures == {"read_unlike": 1}


def test_without_memory_it_is_a_miss_and_everything_is_given_back(memory: LocalCPUTier) -> None:
    own, other = Shard(0, 2), Shard(0, 1)
    put(memory, 1, other)
    tier = ReshardedTier(own, [ShardSource(other, memory)], lambda spec: None)
    assert tier.submit_get(key_of(1, own)).result(10) is None
    assert tier.stats().failures == {"read_no_memory": 1}
    with memory.get(key_of(1, other)) as obj:  # type: ignore[union-attr]
        assert obj.ref_count == 2


def test_sizes_that_do_not_divide_each_other_and_other_stages_are_left_out() -> None:
    assert recipes(Shard(0, 2), all_shards([3])) == []
    assert recipes(Shard(0, 1), [Shard(rank, 2, 1, 2) for rank in range(2)]) == []
    assert recipes(Shard(0, 1), [Shard(0, 2)]) == [], "half of the heads is not there"


def test_the_fewest_reads_come_first_and_of_those_the_smallest() -> None:
    ways = recipes(Shard(1, 4), all_shards(SIZES))
    assert [way.shards for way in ways] == [
        (Shard(1, 4),),
        (Shard(0, 2),),
        (Shard(0, 1),),
        (Shard(2, 8), Shard(3, 8)),
    ]


@pytest.mark.parametrize(
    ("tp_size", "heads", "shards"),
    [(2, 8, [(0, 2), (1, 2)]), (4, 2, [(0, 2), (0, 2), (1, 2), (1, 2)]), (2, 1, [(0, 1), (0, 1)])],
)
def test_ranks_share_heads_where_there_are_more_of_them(
    tp_size: int, heads: int, shards: list[tuple[int, int]]
) -> None:
    assert [Shard.of_heads(rank, tp_size, heads)[:2] for rank in range(tp_size)] == shards
