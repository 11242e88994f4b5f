"""KV that lies in chunks of the cache, or in the pages of an engine, as the source of a blend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from lmcache.blend.kv_source import KVLoadError
from lmcache.memory.memory_obj import MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.paging.paged_connector import PagedConnector


class ChunkPart(NamedTuple):
    """``num_tokens`` tokens of a chunk in host memory, from its token ``offset`` on."""

    obj: MemoryObj
    offset: int
    num_tokens: int


class DenseChunk(NamedTuple):
    """``num_tokens`` tokens, from its token ``offset`` on, of a chunk ``[layers, 2, chunk_tokens, heads, dim]`` at
    ``address``."""

    address: int
    chunk_tokens: int
    offset: int
    num_tokens: int


class ChunkSource:
    """A passage that lies in parts of consecutive chunks; a :class:`lmcache.blend.kv_source.PrefetchingSource`.

    The chunks must be held until everything queued on the device of the pages is done.
    """

    def __init__(self, connector: PagedConnector, parts: Sequence[ChunkPart], length: int) -> None:
        self._connector = connector
        self._chunks = parts
        self._device = connector.tensors[0].device
        self._under_way: dict[int, _Arriving] = {}
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.length = length

    @cached_property
    def _parts(self) -> list[tuple[tuple[torch.Tensor, ...], int, int]]:
        views = self._connector.chunk_views
        return [(views(obj), offset, num_tokens) for obj, offset, num_tokens in self._chunks]

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`lmcache.blend.kv_source.KVSource`. On the device of the pages."""
        if self._device.type == "cpu":
            return self._copied(layer_id)
        self.prefetch(layer_id)
        arriving = self._under_way.pop(layer_id)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arriving.done)
        for plane in arriving.planes:
            plane.record_stream(stream)
        return arriving.planes

    def copy_into(self, layer_id: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """See :class:`lmcache.blend.kv_source.DirectSource`."""
        if self._device.type != "cpu" or not self._fits(start, keys, values):
            return False
        written = 0
        for views, offset, num_tokens in self._parts:
            skipped = min(start, num_tokens)
            start -= skipped
            at, end = offset + skipped, offset + min(num_tokens, skipped + len(keys) - written)
            while at < end:
                page, first = divmod(at, views[0].shape[2])
                count = min(views[0].shape[2] - first, end - at)
                for plane, ours in zip(views, (keys, values), strict=True):
                    ours[written : written + count].copy_(plane[layer_id, page, first : first + count])
                written += count
                at += count
        return True

    def dense_chunks(self) -> list[DenseChunk] | None:
        """None where chunks do not lie so."""
        if any(obj.spec.layout != TOKEN_MAJOR or obj.spec.shape[1] != 2 for obj, _, _ in self._chunks):
            return None
        return [DenseChunk(obj.address, obj.spec.num_tokens, at, count) for obj, at, count in self._chunks]

    def _fits(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
        planes = self._parts[0][0]
        shapes = [plane.shape[3:] for plane in planes]
        return start + len(keys) <= self.num_tokens and shapes == [keys.shape[1:], values.shape[1:]]

    def prefetch(self, layer_id: int) -> None:
        """Start the copy to the device, beside what is computed there."""
        if self._device.type == "cpu" or layer_id in self._under_way:
            return
        stream = _copy_stream(self._device)
        with torch.cuda.stream(stream):
            planes = self._copied(layer_id)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(stream)
        self._under_way[layer_id] = _Arriving(planes, done)

    def _copied(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        planes: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for views, offset, num_tokens in self._parts:
            # A view per plane: [blocks, tokens per block, heads, dim].
            for pieces, chunk in zip(planes, views, strict=True):
                plane = chunk[layer_id]
                piece = plane.reshape(-1, *plane.shape[2:])[offset : offset + num_tokens]
                pieces.append(piece.to(self._device, non_blocking=True))
        keys, values = (pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in planes)
        return keys, values


class _Arriving(NamedTuple):
    planes: tuple[torch.Tensor, torch.Tensor]
    done: torch.cuda.Event


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


class PagesSource:
    """Tokens whose KV an engine's pages hold already; a :class:`lmcache.blend.kv_source.KVSource`."""

    def __init__(self, connector: PagedConnector, slots: torch.Tensor) -> None:
        """``slots``: int64 ``[num_tokens]``, none negative."""
        self._connector = connector
        self._index = connector.token_index(slots)
        self.num_tokens = self.length = len(slots)

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`lmcache.blend.kv_source.KVSource`."""
        planes = self._connector.read_tokens(layer_id, self._index)
        if len(planes) != 2:
            raise KVLoadError("pages of a model with MLA cannot be blended")
        return planes[0], planes[1]
