"""The moved rows of a blend on their way to the device: layer by layer, ahead of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from lmcache.blend.batch import PlacedSpan
from lmcache.blend.chunk_source import ChunkSource
from lmcache.blend.kv_source import KVLoadError
from lmcache.memory.device_copy import Addresses, can_copy_many, copy_many

_MIN_DEPTH = 3
# To queue one call's copies takes the host 20 µs besides what each of them takes (beside an H200). The first layer
# should not wait for others, and none for the last one.
_LAYERS_A_CALL = 4


class _Slot:
    """One layer's room on the device. ``arrived`` and ``free`` are events of the copies and of their reader."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.layer_id = -1
        self.arrived: torch.cuda.Event | None = None
        self.free: torch.cuda.Event | None = None


class StagingRing:
    """Device memory for a few layers, and the stream that fills it; serves one blend after the other.

    ``kept_bytes`` are shared by as many layers as fit, three at least; what more these need is given back when a
    smaller blend comes. So a short prompt is on its way as a whole before the model begins.
    """

    def __init__(self, device: torch.device, kept_bytes: int = 576 * 2**20) -> None:
        self.device = device
        self.kept_bytes = kept_bytes
        self.slots: list[_Slot] = []
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._room = torch.empty(0)
        self._read: torch.cuda.Event | None = None

    def begin(self, num_rows: int, row_numel: int, dtype: torch.dtype, num_layers: int) -> None:
        """Nothing of an earlier blend is wanted any more; there is room for ``[num_rows, row_numel]`` a layer."""
        wanted = num_rows * row_numel
        depth = min(num_layers, max(_MIN_DEPTH, self.kept_bytes // max(1, wanted * dtype.itemsize)))
        total, held = depth * wanted, self._room
        fits = held.dtype == dtype and held.numel() >= total
        if not fits or held.nbytes > max(self.kept_bytes, total * dtype.itemsize):
            self._room = torch.empty(total, dtype=dtype, device=self.device)
            if self.stream is not None:
                # Memory that torch gives out again is free for the current stream only.
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
                self._room.record_stream(self.stream)
        elif self._read is not None and self.stream is not None:
            self.stream.wait_event(self._read)
        self.slots = [_Slot(self._room[index * wanted : (index + 1) * wanted]) for index in range(depth)]

    def slot(self, layer_id: int) -> _Slot:
        return self.slots[layer_id % len(self.slots)]

    def between(self, first: int, end: int) -> torch.Tensor:
        """The rows of some slots, one after the other."""
        size = len(self.slots[0].rows)
        return self._room[first * size : end * size]

    def done(self, first: int, count: int) -> None:
        """All that reads these layers is queued on the current stream."""
        if self.stream is not None:
            self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._read.record(torch.cuda.current_stream(self.device))
            for layer_id in range(first, first + count):
                self.slot(layer_id).free = self._read

    def join(self) -> None:
        """What is queued on the current stream from now on comes after all copies that are under way."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class _Runs:
    """Bytes of chunks that are copied as they lie, layer by layer: where each run of them lies in layer 0, how far its
    layers are apart, and how far behind the first staged row it goes."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int, int, int]] = []

    def add(self, source: int, layer_bytes: int, to: int, nbytes: int) -> None:
        if self._runs:
            before, step, at, size = self._runs[-1]
            if (before + size, step, at + size) == (source, layer_bytes, to):
                self._runs[-1] = before, step, at, size + nbytes
                return
        self._runs.append((source, layer_bytes, to, nbytes))

    def __bool__(self) -> bool:
        return bool(self._runs)

    @cached_property
    def _columns(self) -> tuple[Addresses, ...]:
        return tuple(np.array(self._runs, dtype=np.uint64).T.copy())

    def copy(self, layers: range, to: Sequence[int], stream: torch.cuda.Stream) -> None:
        """Queue the copies of some layers to the addresses ``to``, in order."""
        source, layer_bytes, offsets, sizes = self._columns
        numbers = np.arange(layers.start, layers.stop, dtype=np.uint64)[:, None]
        targets = np.array(to, dtype=np.uint64)[:, None] + offsets
        sources = source + layer_bytes * numbers
        copy_many(targets.ravel(), sources.ravel(), np.tile(sizes, len(layers)), stream)


class _Other(NamedTuple):
    """Rows ``[first, first + num_rows)`` of a source of another kind, staged from row ``at`` on."""

    placed: PlacedSpan
    first: int
    num_rows: int
    at: int


class SourceError(Exception):
    """The KV of one prompt of the batch will not arrive."""

    def __init__(self, prompt: int, reason: str) -> None:
        super().__init__(reason)
        self.prompt = prompt


class StagedLayers:
    """Brings the rows of ``spans`` layer by layer; a layer's rows are asked for once, in ascending order of layers.

    ``k_from`` and ``v_from`` (int32 ``[n]``, on the CPU) are the rows of a staged layer in which the spans' rows lie,
    one span after the other: the same in every layer.
    """

    def __init__(
        self,
        spans: Sequence[PlacedSpan],
        num_layers: int,
        row_shape: tuple[int, int],
        dtype: torch.dtype,
        ring: StagingRing,
    ) -> None:
        """``row_shape``: KV heads and dim."""
        self._ring = ring
        self._num_layers = num_layers
        self._row_shape = row_shape
        self._row_numel = row_shape[0] * row_shape[1]
        self._row_bytes = self._row_numel * dtype.itemsize
        self._runs = _Runs()
        self._others: list[_Other] = []
        runs: list[int] = []  # how many rows of K, then as many of V
        staged = 0
        for placed in spans:
            counts_of_span = self._plan(placed, staged, dtype)
            staged += 2 * sum(counts_of_span)
            runs += counts_of_span
        counts = np.array(runs, dtype=np.int32)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        k_from = (np.arange(len(before)) + before).astype(np.int32)
        self.k_from = torch.from_numpy(k_from)
        self.v_from = torch.from_numpy(k_from + np.repeat(counts, counts))
        self.num_rows = 2 * len(before)
        self._dtype = dtype
        self._next = 0

    def begin(self, bytes_now: int | None = None) -> None:
        """Queue the copies of the first layers, before any is asked for; about as many as make up ``bytes_now``,
        until :meth:`go_on`."""
        self._ring.begin(self.num_rows, self._row_numel, self._dtype, self._num_layers)
        depth = len(self._ring.slots)
        if bytes_now is not None:
            depth = min(depth, max(1, round(bytes_now / max(1, self.num_rows * self._row_bytes))))
        self._fetch(depth)

    def go_on(self) -> None:
        """Queue what :meth:`begin` has left, before any layer is asked for."""
        self._fetch(len(self._ring.slots) - self._next)

    def _plan(self, placed: PlacedSpan, at: int, dtype: torch.dtype) -> list[int]:
        """Note how the rows of a span come; their numbers, run by run."""
        first, end = placed.span.source_start, placed.span.source_start + placed.span.end - placed.span.start
        source = placed.source
        chunks = source.dense_chunks() if isinstance(source, ChunkSource) and can_copy_many(self._ring.device) else None
        if chunks is None:
            self._others.append(_Other(placed, first, end - first, at))
            return [end - first]
        counts = []
        for address, chunk_tokens, offset, num_tokens in chunks:
            skipped = min(first, num_tokens)
            count = min(num_tokens, end) - skipped
            first, end = max(0, first - num_tokens), max(0, end - num_tokens)
            if count > 0:
                plane = chunk_tokens * self._row_bytes
                start = address + (offset + skipped) * self._row_bytes
                for index in range(2):
                    to = (at + index * count) * self._row_bytes
                    self._runs.add(start + index * plane, 2 * plane, to, count * self._row_bytes)
                counts.append(count)
                at += 2 * count
        return counts

    def layer(self, layer_id: int) -> torch.Tensor:
        """``[rows, kv_heads · dim]`` of ``layer_id``, there for what is queued on the current stream from now on, until
        :meth:`done`.

        Raises:
            SourceError: a source failed.
        """
        while self._next <= layer_id:
            self._fetch(1)
        slot = self._ring.slot(layer_id)
        assert slot.layer_id == layer_id
        if slot.arrived is not None:
            torch.cuda.current_stream(self._ring.device).wait_event(slot.arrived)
        rows = self._rows(slot)
        for other in self._others:
            try:
                planes = other.placed.source.layer(layer_id)
            except KVLoadError as error:
                raise SourceError(other.placed.prompt, str(error)) from error
            self._check(other, layer_id, planes)
            for index, plane in enumerate(planes):
                to = other.at + index * other.num_rows
                taken = plane[other.first : other.first + other.num_rows]
                rows[to : to + other.num_rows].view(-1, *self._row_shape).copy_(taken)
        return rows

    def together(self, first: int, count: int) -> torch.Tensor | None:
        """``[count, rows, kv_heads · dim]`` of consecutive layers as one, as :meth:`layer` gives each; None where they
        do not lie so.

        Raises:
            SourceError: a source failed.
        """
        depth = len(self._ring.slots)
        at = first % depth
        if at + count > depth or self._next < first + count:
            return None
        # Copies arrive in the order of layers; only other sources are asked layer by layer.
        for layer_id in range(first if self._others else first + count - 1, first + count):
            self.layer(layer_id)
        return self._ring.between(at, at + count).view(count, self.num_rows, self._row_numel)

    def _check(self, other: _Other, layer_id: int, planes: tuple[torch.Tensor, ...]) -> None:
        for name, plane in zip("KV", planes, strict=True):
            if tuple(plane.shape[1:]) != self._row_shape or len(plane) < other.first + other.num_rows:
                raise SourceError(
                    other.placed.prompt,
                    f"{name} of layer {layer_id} is {list(plane.shape)} in its source, the model's is "
                    f"{list(self._row_shape)} a token, and {other.first + other.num_rows} tokens are wanted",
                )

    def done(self, first: int, count: int = 1) -> None:
        """All that reads the staged rows of these layers is queued."""
        self._ring.done(first, count)
        self._fetch(count)

    def _fetch(self, layers: int) -> None:
        """Queue the copies of the next layers."""
        end = min(self._next + layers, self._num_layers)
        while self._next < end:
            before_last = self._num_layers - 1 if self._next < self._num_layers - 1 else end
            most = min(_LAYERS_A_CALL, self._next + 1)
            together = range(self._next, min(end, before_last, self._next + most))
            self._fetch_together(together)
            self._next = together.stop

    def _fetch_together(self, layers: range) -> None:
        slots = [self._ring.slot(layer_id) for layer_id in layers]
        for slot, layer_id in zip(slots, layers, strict=True):
            slot.layer_id = layer_id
        if not self._runs:
            return
        stream = self._ring.stream
        assert stream is not None
        for read in dict.fromkeys(slot.free for slot in slots):
            if read is not None:
                stream.wait_event(read)
        self._runs.copy(layers, [slot.rows.data_ptr() for slot in slots], stream)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(stream)
        for slot in slots:
            slot.arrived = arrived

    def _rows(self, slot: _Slot) -> torch.Tensor:
        return slot.rows[: self.num_rows * self._row_numel].view(self.num_rows, self._row_numel)
