"""What chunks are called in a remote store where another number of tensor-parallel ranks has written them.

Asking for the names of every size would multiply what a miss costs. So each size leaves a *mark* in the store when it
writes there, which all read together with the generation of :mod:`lmcache.storage.remote.names`, and only sizes that
have one are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmcache.keys import CacheKey, Namespace, Shard
from lmcache.storage.remote.interface import RemoteStore
from lmcache.storage.remote.small_values import write_small
from lmcache.storage.shard_recipes import recipes

_MAX_SIZE = 256
_MARKS = "lmcache/1/sizes"


class OtherSizes:
    """Those of one model of which one divides the other. Thread-safe: what was seen is replaced as a whole."""

    def __init__(self, namespace: Namespace, num_kv_heads: int) -> None:
        """Args:
        namespace: of our shard; all adapters and tenants of the model share the marks.
        num_kv_heads: of the whole model.
        """
        own = namespace.shard
        one_stage = own.pp_size == 1
        sizes = [size for size in range(1, min(num_kv_heads, _MAX_SIZE) + 1) if one_stage and num_kv_heads % size == 0]
        self._recipes = recipes(
            own, [Shard(rank, size) for size in sizes if size != own.tp_size for rank in range(size)]
        )
        model = replace(namespace, tp_rank=0, tp_size=1).id.hex()
        sizes = [own.tp_size, *(recipe.shards[0].tp_size for recipe in self._recipes)]
        # Of no generation: what is forgotten is soon written anew, by the same engines.
        self.marks = [f"{_MARKS}/{model}/ranks-{size}.latest" for size in sizes]
        """Names to read for :meth:`saw`; the first is that of our own size."""
        self._own_mark_is_missing = True
        self._seen = self._recipes[:0]

    @property
    def shards(self) -> list[Shard]:
        """All whose chunks may ever be asked for."""
        return [shard for recipe in self._recipes for shard in recipe.shards]

    @property
    def own_mark_is_missing(self) -> bool:
        """Whether our own size should leave its mark when it has written."""
        return self._own_mark_is_missing and bool(self._recipes)

    def mark(self, store: RemoteStore, timeout: float) -> None:
        """Leave the mark of our own size.

        Raises:
            RemoteStoreError: the store failed.
        """
        write_small(store, [(self.marks[0], b"1")], timeout)
        self._own_mark_is_missing = False

    def saw(self, values: Sequence[bytes | None]) -> None:
        """What the store has at :attr:`marks`."""
        own, *others = values
        self._own_mark_is_missing = own is None
        self._seen = [recipe for recipe, value in zip(self._recipes, others, strict=True) if value is not None]

    def parts(self, key: CacheKey) -> list[list[CacheKey]]:
        """For each size that was seen, the chunks that would together do for ``key``."""
        return [recipe.parts(key) for recipe in self._seen]
