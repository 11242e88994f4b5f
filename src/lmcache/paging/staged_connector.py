"""Chunks of pages on a GPU: over the bus into a staging buffer, then one kernel for all that is in it, or back."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lmcache.memory.device_copy import can_copy_many, copy_many, kernels_reach_pinned
from lmcache.memory.memory_obj import MemoryObj
from lmcache.memory.to_device import to_device
from lmcache.paging.chunk_groups import ChunkGroup, UniformChunks
from lmcache.paging.copy_ring import CopyRing, Sent, after, event_of, on_stream, wait_for
from lmcache.paging.layout import KVLayout
from lmcache.paging.token_connector import TokenConnector

if TYPE_CHECKING:
    from lmcache.kernels.chunk_copy import PageAddresses

_LOAD_DEPTH = 3
# While one is copied the next is filled, which takes a twentieth of the time.
_SAVE_DEPTH = 2
# Of a staging buffer for loads: what few calls on the host bring, and still little of the GPU's memory.
_GROUP_BYTES = 64 << 20
# Of one for saves: their calls take the interpreter away from the engine, a few for each group.
_SAVE_BYTES = 64 << 20
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class _OnTheirWay(NamedTuple):
    """Chunks whose first groups were sent ahead. An object that was given back meanwhile is no other's."""

    objs: list[MemoryObj]
    groups: dict[ChunkGroup, Sent]


class StagedConnector(TokenConnector):
    """Chunks as those of :class:`TokenConnector`, moved at the speed of the bus.

    Pages are written by work on torch's current stream, after all that is queued there. They are read after that too,
    and what was read is in host memory when the call returns. Chunks that are not pinned are moved more slowly.
    """

    def __init__(self, kv_layout: KVLayout, tensors: Sequence[torch.Tensor], *, background_saves: bool = False) -> None:
        """Args:
        background_saves: nobody waits for what is read from pages, and an engine goes on meanwhile: leave it the bus
            and the GPU, though it takes twice as long.
        """
        super().__init__(kv_layout, tensors)
        self._background_saves = background_saves
        self._in, self._out = CopyRing(self._device, _LOAD_DEPTH), CopyRing(self._device, _SAVE_DEPTH)
        self._ahead: _OnTheirWay | None = None
        views = [kv_layout.plane_views(tensors, layer) for layer in self._all_layers]
        self._views = views  # what the kernels' addresses point at
        itemsize = kv_layout.dtype.itemsize
        self._row_bytes = kv_layout.num_heads * kv_layout.head_dim * itemsize
        strides = [stride * itemsize for plane in kv_layout.planes for stride in plane.strides[:3]]
        bases = [view.data_ptr() for planes in views for view in planes]
        if any(plane.strides[3] != 1 for plane in kv_layout.planes):
            raise ValueError(f"layout {kv_layout.name!r}: the elements of a head do not lie one after the other")
        self._word_bytes = math.gcd(8, kv_layout.head_dim * itemsize, *strides, *bases)

    @cached_property
    def _pages(self) -> PageAddresses:
        from lmcache.kernels.chunk_copy import PageAddresses

        at, word = self.kv_layout, self._word_bytes
        itemsize = at.dtype.itemsize
        bases = torch.tensor([[view.data_ptr() for view in planes] for planes in self._views])
        words = [stride * itemsize // word for plane in at.planes for stride in plane.strides[:3]]
        aligned = all(int(base) % 16 == 0 for base in bases.flatten())
        return PageAddresses(
            bases=bases.to(self._device),
            word=_WORDS[word],
            num_heads=at.num_heads,
            head_words=at.head_dim * itemsize // word,
            head_strides=tuple(plane.strides[2] * itemsize // word for plane in at.planes),
            alignment=math.gcd(16 // word, *words) if aligned else 1,
        )

    def warm_up(self) -> None:
        """Have the kernels compiled; no page is touched."""
        from lmcache.kernels.chunk_copy import copy_chunks
        from lmcache.kernels.chunks_to_host import copy_to_host

        at, word = self.kv_layout, self._pages.word
        planes = len(at.planes)
        words = at.num_heads * self._pages.head_words
        staged = torch.zeros((1, len(self._all_layers), planes, 1, words), dtype=word, device=self._device)
        nowhere = torch.full((planes,), -1, dtype=torch.int64, device=self._device)
        for to_pages in (True, False):
            copy_chunks(staged, self._pages, nowhere, 1, 1, self._all_layers, to_pages=to_pages)
        if self._background_saves:
            at_staged = torch.tensor([staged.data_ptr()], device=self._device)
            copy_to_host(at_staged, self._pages, nowhere, 1, 1, 1, self._all_layers, alignment=16)

    @torch.inference_mode()
    def send_ahead(self, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]]) -> None:
        """See :class:`GPUConnectorInterface`. As much as the staging buffers hold; nothing while they are in use, or
        before a load has made them."""
        ring = self._in
        if not objs or not ring.lock.acquire(blocking=False):
            return
        try:
            self._ahead = None
            token_bytes = len(self.kv_layout.planes) * self._row_bytes
            chunks = UniformChunks.of(objs, ranges, token_bytes)
            if chunks is None:
                return
            sent: dict[ChunkGroup, Sent] = {}
            for group in islice(chunks.groups(self._all_layers, _GROUP_BYTES), _LOAD_DEPTH):
                if not ring.has_room(chunks.room(group)):
                    break
                sent[group] = self._send(ring, chunks, group)
            self._ahead = _OnTheirWay(list(objs), sent)
        finally:
            ring.lock.release()

    def _move_checked(
        self,
        to_pages: bool,
        layers: range,
        objs: Sequence[MemoryObj],
        ranges: Sequence[tuple[int, int]],
        slots: torch.Tensor,
    ) -> None:
        if not objs:
            return
        (self._load if to_pages else self._save)(layers, objs, ranges, slots)

    def _load(
        self,
        layers: range,
        objs: Sequence[MemoryObj],
        ranges: Sequence[tuple[int, int]],
        slots: torch.Tensor,
    ) -> None:
        ring = self._in
        with ring.lock:
            ahead = self._take_ahead(layers, objs)
            offsets = self._offsets(slots).view(-1)
            for chunks, start in self._alike(objs, ranges):
                for group in chunks.groups(layers, _GROUP_BYTES):
                    sent = ahead.pop(group, None) or self._send(ring, chunks, group)
                    self._load_group(sent, chunks, group, offsets[start:], len(slots))

    def _take_ahead(self, layers: range, objs: Sequence[MemoryObj]) -> dict[ChunkGroup, Sent]:
        """What was sent ahead of a load of ``objs``. What it was sent for otherwise is forgotten, for the buffers are
        given to others now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or layers != self._all_layers or len(objs) != len(ahead.objs):
            return {}
        return ahead.groups if all(map(operator.is_, objs, ahead.objs)) else {}

    def _save(
        self,
        layers: range,
        objs: Sequence[MemoryObj],
        ranges: Sequence[tuple[int, int]],
        slots: torch.Tensor,
    ) -> None:
        ring = self._out
        with ring.lock:
            after(event_of(self._current()), ring.kernels)
            try:
                # The caller's stream may be the one that the engine computes on.
                with on_stream(ring.kernels):
                    offsets = self._offsets(slots).view(-1)
                    holes = int(slots.min()) < 0
                    for chunks, start in self._alike(objs, ranges):
                        if self._background_saves and self._can_write(chunks.objs):
                            self._save_directly(chunks, layers, offsets[start:], len(slots))
                            continue
                        for group in chunks.whole_groups(layers, _SAVE_BYTES):
                            self._save_group(ring, self._current(), chunks, group, offsets[start:], len(slots), holes)
            finally:  # also after an error: the chunks' memory may be given to others then
                for stream in (ring.kernels, ring.stream):
                    wait_for(stream)

    def _alike(
        self, objs: Sequence[MemoryObj], ranges: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[UniformChunks, int]]:
        """What can be moved together, and the first token of each."""
        token_bytes = len(self.kv_layout.planes) * self._row_bytes
        together = UniformChunks.of(objs, ranges, token_bytes)
        alike = [together] if together is not None else [UniformChunks([obj], token_bytes) for obj in objs]
        for chunks, (start, _) in zip(alike, ranges, strict=False):
            yield chunks, start

    def _send(self, ring: CopyRing, chunks: UniformChunks, group: ChunkGroup) -> Sent:
        """Copy a group into the next staging buffer."""
        room = chunks.room(group)
        buffer = ring.take(room)
        there = buffer.bytes[:room]
        after(buffer.free, ring.stream)
        if ring.stream is not None and can_copy_many(self._device):
            copy_many(*chunks.addresses(group, there.data_ptr()), ring.stream)
        else:
            with on_stream(ring.stream):
                for share, kept in zip(there.view(len(group.chunks), -1), chunks.shares(group), strict=True):
                    share[: len(kept)].copy_(kept, non_blocking=True)
        return Sent(buffer, there, event_of(ring.stream))

    def _load_group(
        self, sent: Sent, chunks: UniformChunks, group: ChunkGroup, offsets: torch.Tensor, total_tokens: int
    ) -> None:
        from lmcache.kernels.chunk_copy import copy_chunks

        current = self._current()
        after(sent.arrived, current)
        first, num_tokens = chunks.tokens_of(group)
        staged = self._staged(sent.bytes, chunks, group)
        copy_chunks(staged, self._pages, offsets[first:], num_tokens, total_tokens, group.layers, to_pages=True)
        sent.buffer.free = event_of(current)

    def _save_group(
        self,
        ring: CopyRing,
        current: torch.cuda.Stream | None,
        chunks: UniformChunks,
        group: ChunkGroup,
        offsets: torch.Tensor,
        total_tokens: int,
        holes: bool,
    ) -> None:
        from lmcache.kernels.chunk_copy import copy_chunks

        room = chunks.room(group)
        buffer = ring.take(room)
        there = buffer.bytes[:room]
        after(buffer.free, current)
        if holes:  # what has no slot keeps its place in the chunk as it was
            for share, kept in zip(there.view(len(group.chunks), -1), chunks.shares(group), strict=True):
                share[: len(kept)].copy_(kept)
        first, num_tokens = chunks.tokens_of(group)
        staged = self._staged(there, chunks, group)
        copy_chunks(staged, self._pages, offsets[first:], num_tokens, total_tokens, group.layers, to_pages=False)
        after(event_of(current), ring.stream)
        with on_stream(ring.stream):
            for share, kept in zip(there.view(len(group.chunks), -1), chunks.shares(group), strict=True):
                kept.copy_(share[: len(kept)], non_blocking=True)
        buffer.free = event_of(ring.stream)

    def _save_directly(self, chunks: UniformChunks, layers: range, offsets: torch.Tensor, total_tokens: int) -> None:
        from lmcache.kernels.chunks_to_host import copy_to_host

        group = ChunkGroup(range(len(chunks.objs)), layers)
        _, starts, _ = chunks.addresses(group, 0)
        copy_to_host(
            to_device(torch.from_numpy(starts.view(np.int64)), self._device),
            self._pages,
            offsets,
            chunks.tokens_of(group)[1],
            chunks.num_tokens,
            total_tokens,
            layers,
            alignment=math.gcd(16, *starts.tolist()),
        )

    def _can_write(self, objs: Sequence[MemoryObj]) -> bool:
        """Whether kernels reach the memory of chunks."""
        if self._device.type != "cuda":
            return True
        return kernels_reach_pinned(self._device) and all(obj.bytes.is_pinned() for obj in objs)

    def _staged(self, there: torch.Tensor, chunks: UniformChunks, group: ChunkGroup) -> torch.Tensor:
        """``there`` as :func:`~lmcache.kernels.chunk_copy.copy_chunks` wants it."""
        planes = len(self.kv_layout.planes)
        return there.view(self._pages.word).view(len(group.chunks), len(group.layers), planes, chunks.num_tokens, -1)

    def _offsets(self, slots: torch.Tensor) -> torch.Tensor:
        """int64 ``[planes, T]`` on the device: words from a plane's base to each token, −1 without a slot."""
        at = self.kv_layout
        nowhere = slots < 0 if int(slots.min()) < 0 else None
        planes: dict[tuple[int, ...], torch.Tensor] = {}
        for plane in at.planes:
            if plane.strides in planes:
                continue
            words = at.token_offsets(slots, plane)
            if self._word_bytes != at.dtype.itemsize:
                words = words.mul_(at.dtype.itemsize).bitwise_right_shift_(self._word_bytes.bit_length() - 1)
            planes[plane.strides] = words if nowhere is None else words.masked_fill_(nowhere, -1)
        return to_device(torch.stack([planes[plane.strides] for plane in at.planes]), self._device)

    def _current(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
