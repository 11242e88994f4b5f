"""Which chunks of other numbers of tensor-parallel ranks, cut or joined by heads, make a chunk of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmcache.keys import CacheKey, Shard


@dataclass(frozen=True)
class Recipe:
    """A chunk of ``own`` is the chunks of ``shards`` side by side, from share ``first`` of ``shares`` equal shares of
    that on.

    One shard and several shares: it is cut. One share: the shards are joined.
    """

    own: Shard
    shards: tuple[Shard, ...]
    first: int
    shares: int

    def parts(self, key: CacheKey) -> list[CacheKey]:
        """What the chunk ``key`` is made of, in the order of ``shards``."""
        return [key.moved(self.own, shard) for shard in self.shards]


def recipes(own: Shard, shards: Iterable[Shard]) -> list[Recipe]:
    """The ways to make chunks of ``own`` out of those of ``shards``: those with the fewest reads first, then those that
    read the least.

    Only sizes of which one divides the other go together. Equal shards too may lie elsewhere: where ranks share heads.
    """
    found: list[Recipe] = []
    here = {shard for shard in shards if shard[2:] == own[2:]}
    for size in {shard.tp_size for shard in here}:
        if own.tp_size % size == 0:
            shares = own.tp_size // size
            source_rank, first = divmod(own.tp_rank, shares)
            ranks = [source_rank]
        elif size % own.tp_size == 0:
            parts = size // own.tp_size
            ranks, first, shares = [own.tp_rank * parts + part for part in range(parts)], 0, 1
        else:
            continue
        wanted = tuple(Shard(rank, size, *own[2:]) for rank in ranks)
        if here.issuperset(wanted):
            found.append(Recipe(own, wanted, first, shares))
    return sorted(found, key=lambda recipe: (len(recipe.shards), recipe.shares))
