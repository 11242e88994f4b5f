"""The KV of a batch that is blended where it belongs: in an engine's pages on a GPU, by kernels.

Nothing is held beside the pages but a few layers on their way. What :class:`lmcache.blend.layer_kv.BatchKV` does in
tensors of its own is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lmcache.blend.batch import BlendBatch
from lmcache.blend.correctors.interface import BatchedCorrector, Corrector, LayerCorrection, Memo, RowCorrection
from lmcache.blend.dense_runs import DenseAttention
from lmcache.blend.fp8_pages import FP8_DTYPES, Fp8Pages
from lmcache.blend.graph_recorder import WorkRecorder
from lmcache.blend.layer_kv import BatchKV, LayerKV, PromptLoadError
from lmcache.blend.layer_replay import LayerReplays
from lmcache.blend.paged_layer import OnDevice, PagedLayer, PromptPages, dense_heads
from lmcache.blend.rope import FusedRope
from lmcache.blend.staged_layers import SourceError, StagedLayers, StagingRing
from lmcache.memory.to_device import to_device
from lmcache.paging.paged_connector import PagedConnector

if TYPE_CHECKING:
    from lmcache.kernels.kv_write import Turns

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
    ) -> None:
        """``slots``: int64 ``[N]`` on the CPU, one for every row of the batch. ``exact``: bool ``[N]``, rows whose KV
        is in the pages and stays as it is, whatever is computed. ``dense``: the engine's own attention; not of fp8.
        ``recorder``: spares the host the work that is the same in all layers. ``fp8``: None where the pages hold real
        numbers."""
        from lmcache.blend.page_rows import page_offsets, page_rows

        super().__init__(batch, ropes, corrector)
        layout = connector.kv_layout
        self._moved = [placed for placed in batch.placed if not placed.span.exact]
        self._staged = StagedLayers(self._moved, len(ropes), (layout.num_heads, layout.head_dim), layout.dtype, ring)
        self._connector = connector
        self._sent = OnDevice(ring.device, exact)
        self._pages = PromptPages(slots, layout.block_size, ring.device, dense if fp8 is None else None)
        offsets = to_device(page_offsets(layout, slots), ring.device)
        self._planes = [layout.plane_views(connector.tensors, layer) for layer in range(len(ropes))]
        if fp8 is not None:
            self._planes = [
                (*(plane.view(fp8.dtype) for plane in planes), *scales)
                for planes, scales in zip(self._planes, fp8.of_layers, strict=True)
            ]
        self._kv = page_rows(layout, self._planes[0][0], self._planes[0][1], offsets).at(*self._planes[0])
        spans = [np.arange(*placed.rows) for placed in self._moved]
        self._rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *spans]))
        self._froms = tuple(to_device(rows, ring.device) for rows in (self._staged.k_from, self._staged.v_from))
        self._turns: dict[int, Turns] = {}
        if self._moved:
            # Before the layers, which fill the way to the device for milliseconds.
            self._sent.rows(self._rows)
            for rope in ropes:
                self._turns_of(rope)
        self._staged.begin()
        self._replays: LayerReplays | None = None
        if recorder is not None and corrector.alike_in_layers:
            scales = None if fp8 is None or fp8.alike else fp8.table
            planes = [(planes[0], planes[1]) for planes in self._planes]
            self._replays = LayerReplays.of(recorder, planes, self._kv, scales)

    def load(self, layer_id: int, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        from lmcache.kernels.kv_write import place

        layer = PagedLayer(layer_id, self._kv.at(*self._planes[layer_id]), self._sent, self._pages)
        if not self._moved:
            return layer
        try:
            staged = self._staged.layer(layer_id)
        except SourceError as error:
            raise PromptLoadError(error.prompt, str(error)) from error
        sent = self._sent
        k_from, v_from = self._froms
        if staged.dtype != layer.kv.keys.dtype:
            staged = staged.view(layer.kv.keys.dtype)
        place(staged, k_from, v_from, sent.rows(self._rows), layer.kv, self._turns_of(self.ropes[layer_id]))
        self._staged.done(layer_id)
        return layer

    def run_alike(self, kind: Hashable, layer: LayerKV, work: Callable[[LayerKV], torch.Tensor]) -> torch.Tensor:
        """See :meth:`lmcache.blend.layer_kv.BatchKV.run_alike`."""
        assert isinstance(layer, PagedLayer)
        return work(layer) if self._replays is None else self._replays.run(kind, layer, work)

    def _turns_of(self, rope: FusedRope | None) -> Turns | None:
        """How far each of the moved rows turns; layers with one rope share it."""
        from lmcache.kernels.kv_write import Turns

        if rope is None:
            return None
        if id(rope) not in self._turns:
            turned, numbers = self._turned_singly(rope) if rope.depends_on_length else self._turned_by_distance(rope)
            cos, sin = to_device(turned.to(torch.float32), self._sent.device).unbind(0)
            of_row = to_device(numbers.to(torch.int32), self._sent.device)
            self._turns[id(rope)] = Turns(cos, sin, of_row, rope.is_neox_style)
        return self._turns[id(rope)]

    def _turned_by_distance(self, rope: FusedRope) -> tuple[torch.Tensor, torch.Tensor]:
        """``[2, n, rotary_dim / 2]``, cos and sin, and which of them each row has: all rows of a span move alike."""
        distances = torch.tensor([placed.span.start - placed.span.old_start for placed in self._moved])
        angles, gain = rope.turn(torch.zeros_like(distances), distances)
        angles = angles.expand(len(distances), -1)
        counts = [end - start for start, end in (placed.rows for placed in self._moved)]
        return torch.stack([angles.cos(), angles.sin()]) * gain, torch.from_numpy(np.arange(len(counts)).repeat(counts))

    def _turned_singly(self, rope: FusedRope) -> tuple[torch.Tensor, torch.Tensor]:
        """The same where it matters how long the two sequences are."""
        tables, numbers, count = [], [], 0
        for placed in self._moved:
            span, (start, end) = placed.span, placed.rows
            new = self.batch.positions[start:end]
            lengths = placed.source.length, self.batch.plans[placed.prompt].num_tokens
            angles, gain = rope.turn(new + (span.old_start - span.start), new, *lengths)
            numbers.append(torch.arange(end - start) + count if len(angles) > 1 else torch.full((end - start,), count))
            count += len(angles)
            tables.append(torch.stack([angles.cos() * gain, angles.sin() * gain]))
        return torch.cat(tables, 1), torch.cat(numbers)

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
