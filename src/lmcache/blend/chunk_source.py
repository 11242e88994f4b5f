"""KV that lies in chunks of the cache, or in the pages of an engine, as the source of a blend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lmcache.blend.kv_source import KVLoadError
from lmcache.memory.memory_obj import MemoryObj
from lmcache.paging.paged_connector import PagedConnector


class ChunkPart(NamedTuple):
    """``num_tokens`` tokens of a chunk in host memory, from its token ``offset`` on."""

    obj: MemoryObj
    offset: int
    num_tokens: int


class ChunkSource:
    """A passage that lies in parts of consecutive chunks; a :class:`lmcache.blend.kv_source.KVSource`.

    The chunks must be held for as long as it is used.
    """

    def __init__(self, connector: PagedConnector, parts: Sequence[ChunkPart], length: int) -> None:
        self._connector = connector
        self._parts = parts
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.length = length

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`lmcache.blend.kv_source.KVSource`."""
        planes: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for obj, offset, num_tokens in self._parts:
            # A view per plane: [blocks, tokens per block, heads, dim].
            for views, chunk in zip(planes, self._connector.chunk_views(obj), strict=True):
                plane = chunk[layer_id]
                views.append(plane.reshape(-1, *plane.shape[2:])[offset : offset + num_tokens])
        keys, values = (views[0] if len(views) == 1 else torch.cat(views) for views in planes)
        return keys, values


class PagesSource:
    """Tokens whose KV an engine's pages hold already; a :class:`lmcache.blend.kv_source.KVSource`."""

    def __init__(self, connector: PagedConnector, slots: torch.Tensor) -> None:
        """``slots``: int64 ``[num_tokens]``, none negative."""
        self._connector = connector
        self._slots = slots
        self.num_tokens = self.length = len(slots)

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`lmcache.blend.kv_source.KVSource`."""
        planes = self._connector.read_slots(layer_id, self._slots)
        if len(planes) != 2:
            raise KVLoadError("pages of a model with MLA cannot be blended")
        return planes[0], planes[1]
