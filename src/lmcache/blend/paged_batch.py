"""The KV of a batch that is blended where it belongs: in an engine's pages on a GPU, by kernels.

Nothing is held beside the pages but a few layers on their way. What :class:`lmcache.blend.layer_kv.BatchKV` does in
tensors of its own is the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from lmcache.blend.batch import BlendBatch
from lmcache.blend.correctors.interface import (
    BatchedCorrector,
    Corrector,
    LayerCorrection,
    Memo,
    RowCorrection,
    RowsAhead,
)
from lmcache.blend.dense_runs import DenseAttention
from lmcache.blend.fp8_pages import FP8_DTYPES, Fp8Pages
from lmcache.blend.graph_recorder import WorkRecorder
from lmcache.blend.layer_kv import BatchKV, LayerKV, PromptLoadError
from lmcache.blend.layer_replay import LayerReplays
from lmcache.blend.paged_layer import OnDevice, PagedLayer, PromptPages, dense_heads
from lmcache.blend.place_layers import PlaceLayers
from lmcache.blend.rope import FusedRope
from lmcache.blend.staged_ahead import StagedAhead, stage
from lmcache.blend.staged_layers import SourceError, StagingRing
from lmcache.memory.to_device import to_device
from lmcache.paging.paged_connector import PagedConnector

if TYPE_CHECKING:
    from lmcache.kernels.kv_rows import KVLayers

_UNKNOWN = torch.empty(0)  # nothing fresh is needed to load a layer
# Of long prompts a layer is still on its way when the GPU could begin with it. The last one comes when nothing else is
# left to do, so the one before is not to wait for it.
_LAST_ALONE_IN_GROUPS_OF = 6
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PagedBatchKV(BatchKV):
    """All layers of a batch, in the pages of ``connector``."""

    def __init__(
        self,
        batch: BlendBatch,
        ropes: Sequence[FusedRope | None],
        corrector: Corrector,
        connector: PagedConnector,
        slots: torch.Tensor,
        exact: torch.Tensor,
        ring: StagingRing,
        dense: DenseAttention | None = None,
        recorder: WorkRecorder | None = None,
        fp8: Fp8Pages | None = None,
        ahead: StagedAhead | None = None,
    ) -> None:
        """``slots``: int64 ``[N]`` on the CPU, one for every row of the batch. ``exact``: bool ``[N]``, rows whose KV
        is in the pages and stays as it is, whatever is computed. ``dense``: the engine's own attention; not of fp8.
        ``recorder``: spares the host the work that is the same in all layers. ``fp8``: None where the pages hold real
        numbers. ``ahead``: what was staged for this batch already."""
        from lmcache.blend.page_rows import page_offsets, page_rows

        super().__init__(batch, ropes, corrector)
        layout = connector.kv_layout
        self._moved = [placed for placed in batch.placed if not placed.span.exact]
        staged = None if ahead is None else ahead.take(self._moved)
        self._staged = staged or stage(self._moved, len(ropes), layout, ring)
        self._connector = connector
        self._sent = OnDevice(ring.device, exact)
        self._pages = PromptPages(slots, layout.block_size, ring.device, dense if fp8 is None else None)
        offsets = to_device(page_offsets(layout, slots), ring.device)
        self._planes: list[tuple[torch.Tensor, ...]] = list(connector.planes)
        if fp8 is not None:
            self._planes = [
                (*(plane.view(fp8.dtype) for plane in planes), *scales)
                for planes, scales in zip(self._planes, fp8.of_layers, strict=True)
            ]
        self._kv = page_rows(layout, self._planes[0][0], self._planes[0][1], offsets).at(*self._planes[0])
        self._placing = PlaceLayers(self._staged, self._moved, batch, ropes, ring.device)
        # Only now: layers fill the way to the device for milliseconds.
        if staged is None:
            self._staged.begin()
        else:
            self._staged.go_on()
        distances = connector.layer_distances
        alike = distances is not None and not any(apart % self._kv.alignment for apart in distances)
        self._distances = connector.distances_on_device if alike else None
        self._replays: LayerReplays | None = None
        if recorder is not None and corrector.alike_in_layers:
            recorder.forget()  # what the blend before has recorded
            if self._distances is not None:
                scales = None if fp8 is None or fp8.alike else fp8.table
                self._replays = LayerReplays(recorder, self._distances, self._kv, scales)

    def load(self, layer_id: int, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        layer = PagedLayer(layer_id, self._kv.at(*self._planes[layer_id]), self._sent, self._pages)
        if self._moved:
            try:
                self._placing.one(layer_id, layer.kv)
            except SourceError as error:
                raise PromptLoadError(error.prompt, str(error)) from error
        return layer

    def run_alike(
        self,
        kind: Hashable,
        layer: LayerKV,
        take: Callable[[LayerKV], None],
        attention: Callable[[LayerKV], torch.Tensor],
    ) -> torch.Tensor:
        """See :meth:`lmcache.blend.layer_kv.BatchKV.run_alike`."""
        assert isinstance(layer, PagedLayer)
        if self._replays is None:
            return super().run_alike(kind, layer, take, attention)
        return self._replays.run(kind, layer, take, attention)

    def get_ready(
        self, layer_id: int, rows: torch.Tensor, dtype: torch.dtype, covers: tuple[int, int], memo: Memo
    ) -> None:
        held = self._layers.get(layer_id)
        corrected_to = 0 if held is None else held.corrected_to
        key = "ready", covers, corrected_to
        if key not in memo:
            memo[key] = None
            spans = self.spans_to_correct(corrected_to, rows, covers, memo)
            if spans and isinstance(self.corrector, BatchedCorrector):
                in_place = len(self._layers) == len(self.ropes)
                ahead = RowsAhead(rows, dtype, spans, memo, self._kv, self._layers_from, in_place)
                memo[key] = self.corrector.preparation(ahead)
        if (prepare := memo[key]) is not None:
            start, loading = time.perf_counter(), self.seconds["load"]
            prepare(layer_id)
            self.seconds["correct"] += time.perf_counter() - start - (self.seconds["load"] - loading)

    def _layers_from(self, first: int, count: int) -> KVLayers:
        from lmcache.kernels.kv_rows import KVLayers

        if self._distances is None:
            count = 1
        end = min(first + count, len(self.ropes))
        if count <= _LAST_ALONE_IN_GROUPS_OF and first + 1 < len(self.ropes):
            end = min(end, len(self.ropes) - 1)
        missing = [index for index in range(first, end) if index not in self._layers]
        if len(missing) > 1:
            self._load_together(range(missing[0], end))
        for index in range(first, end):
            self.layer(index, _UNKNOWN, _UNKNOWN)
        if self._distances is None:
            return KVLayers(self._kv.at(*self._planes[first]), None)
        return KVLayers(self._kv, self._distances[first:end])

    def _load_together(self, layer_ids: range) -> None:
        """If they can be; otherwise they are loaded one by one when they are wanted."""
        if not self._moved or self._distances is None:
            return
        from lmcache.kernels.kv_rows import KVLayers

        start = time.perf_counter()
        layers = KVLayers(self._kv, self._distances[layer_ids.start : layer_ids.stop])
        try:
            if self._placing.together(layer_ids.start, layers):
                for index in layer_ids:
                    kv = self._kv.at(*self._planes[index])
                    self._layers[index] = PagedLayer(index, kv, self._sent, self._pages)
        except SourceError as error:
            raise PromptLoadError(error.prompt, str(error)) from error
        self.seconds["load"] += time.perf_counter() - start

    def correct_spans(
        self,
        layer: LayerKV,
        rows: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: tuple[tuple[int, int], ...],
        memo: Memo,
    ) -> None:
        assert isinstance(layer, PagedLayer)
        k, v = dense_heads(k), dense_heads(v)
        if isinstance(self.corrector, BatchedCorrector):
            self.corrector.correct_rows(RowCorrection(layer.layer_id, layer, rows, k, v, spans, memo))
            return
        on_device: _CorrectionIndex | None = memo.get(("paged", spans))
        if on_device is None:
            on_device = memo["paged", spans] = _CorrectionIndex.of(rows, spans, self.batch.positions, k.device)
        keys, values = layer.read(on_device.every_row)
        self.corrector.correct(
            LayerCorrection(
                layer_id=layer.layer_id,
                keys=keys,
                values=values,
                rows=on_device.rows,
                fresh_keys=k,
                fresh_values=v,
                spans=spans,
                positions=on_device.positions,
                rope=self.ropes[layer.layer_id],
                memo=memo,
            )
        )
        from lmcache.kernels.kv_write import write

        moved = on_device.moved
        write(keys[moved], values[moved], moved.to(torch.int32), layer.kv)

    def let_go(self, layer: LayerKV) -> None:
        """It stays in the pages."""

    def tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [], []


class _CorrectionIndex(NamedTuple):
    """What a corrector that wants the whole batch is given in every layer, on the device."""

    rows: torch.Tensor
    positions: torch.Tensor
    every_row: torch.Tensor
    moved: torch.Tensor

    @classmethod
    def of(
        cls, rows: torch.Tensor, spans: tuple[tuple[int, int], ...], positions: torch.Tensor, device: torch.device
    ) -> _CorrectionIndex:
        moved = torch.cat([torch.arange(*span) for span in spans])
        every_row = torch.arange(len(positions), dtype=torch.int32)
        return cls(rows.to(device), positions.to(device), every_row.to(device), moved.to(device))


def can_blend_in_pages(
    connector: PagedConnector, ropes: Sequence[FusedRope | None], fp8: Fp8Pages | None = None
) -> bool:
    """Whether kernels can blend in these pages."""
    from lmcache.kernels.availability import fp8_kernels_for, kernels_for

    layout = connector.kv_layout
    if fp8 is None:
        known = layout.dtype in _DTYPES
    else:
        known = fp8.dtype in FP8_DTYPES and layout.dtype in (fp8.dtype, torch.uint8) and fp8_kernels_for(fp8.device)
    return (
        kernels_for(connector.tensors[0].device)
        and len(layout.planes) == 2
        and layout.planes[0].strides == layout.planes[1].strides
        and layout.planes[0].strides[3] == 1
        and layout.head_dim <= 256
        and known
        and not any(rope is not None and rope.rotary_at_end for rope in ropes)
    )
