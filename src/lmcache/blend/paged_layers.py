"""The KV of a batch that is blended where it belongs: in an engine's pages on a GPU, by kernels.

Nothing is held beside the pages but a few layers on their way. What :class:`lmcache.blend.layer_kv.BatchKV` does in
tensors of its own is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmcache.blend.attention import QueryMask, Scoring
from lmcache.blend.batch import BlendBatch, PlacedSpan
from lmcache.blend.correctors.interface import BatchedCorrector, Corrector, LayerCorrection, Memo, RowCorrection
from lmcache.blend.dense_runs import RUN_TOKENS, DenseAttention, DenseRuns, dense_runs
from lmcache.blend.layer_kv import BatchKV, LayerKV, PromptLoadError
from lmcache.blend.rope import FusedRope
from lmcache.blend.staged_layers import SourceError, StagedLayers, StagingRing
from lmcache.paging.paged_connector import PagedConnector

if TYPE_CHECKING:
    from lmcache.kernels.kv_rows import KVRows
    from lmcache.kernels.kv_write import Turns
    from lmcache.kernels.sparse_attention import SeenByAll

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class OnDevice:
    """Index tensors of the host, each sent to the device once."""

    def __init__(self, device: torch.device, exact: torch.Tensor) -> None:
        """``exact``: bool ``[N]``, rows that nobody may write."""
        self.device = device
        self._exact = exact
        self._sent: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` as int32."""
        return self._send(rows, writable=False)

    def writable(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` as int32, −1 in place of exact ones."""
        return self._send(rows, writable=True)

    def _send(self, rows: torch.Tensor, *, writable: bool) -> torch.Tensor:
        held = self._sent.get((id(rows), writable))
        if held is None:
            numbers = torch.where(self._exact[rows], -1, rows) if writable else rows
            # The host's is kept, so that no other can have its id.
            held = self._sent[id(rows), writable] = rows, numbers.to(torch.int32).to(self.device)
        return held[1]


class PromptPages:
    """The pages of a batch for an engine's own attention, ``dense``; None: there is none."""

    def __init__(
        self, slots: torch.Tensor, block_size: int, device: torch.device, dense: DenseAttention | None
    ) -> None:
        self.dense = dense
        self._slots = slots
        self._block_size = block_size
        self._device = device
        self._made: dict[int, tuple[QueryMask, DenseRuns | None]] = {}

    def runs(self, keys: slice, mask: QueryMask, scoring: Scoring) -> DenseRuns | None:
        if self.dense is None or scoring.softcap is not None or scoring.sinks is not None:
            return None
        if mask.sliding_window is not None or mask.known is not None:
            return None
        held = self._made.get(id(mask))
        if held is None:  # the mask is kept, so that no other can have its id
            runs = dense_runs(mask.positions_on_host, self._slots[keys], self._block_size, self._device)
            held = self._made[id(mask)] = mask, runs
        return held[1]


class PagedLayer(LayerKV):
    """One layer of the batch in its pages. It has no ``keys`` and ``values`` of its own."""

    def __init__(self, layer_id: int, kv: KVRows, sent: OnDevice, pages: PromptPages) -> None:
        none = torch.empty(0, 0, 0)
        super().__init__(layer_id, none, none)
        num_rows = len(kv.offsets)
        self.kv = kv
        self._sent = sent
        self._pages = pages
        self.fresh = torch.zeros(num_rows, dtype=torch.bool)
        self.change = {}
        self._changes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def measure(self, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        from lmcache.kernels.kv_read import deviation

        first = ~self.fresh[rows]
        if not bool(first.all()):
            at = torch.nonzero(first)[:, 0]
            rows, at = rows[at], at.to(k.device)
            k, v = k[at], v[at]
        self._changes.append((rows, deviation(k, v, self._sent.rows(rows), self.kv)))

    def read_change(self) -> None:
        """Bring what was measured to the host, into ``change``."""
        if not self.change:
            self.change = {name: torch.zeros(len(self.fresh)) for name in "kv"}
        for rows, measured in self._changes:
            for name, change in zip("kv", measured.cpu(), strict=True):
                self.change[name][rows] = change
        self._changes.clear()

    def write(self, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        from lmcache.kernels.kv_write import write

        write(_dense_heads(k), _dense_heads(v), self._sent.writable(rows), self.kv)
        self.fresh[rows] = True

    def attention(self, q: torch.Tensor, keys: slice, mask: QueryMask, scoring: Scoring) -> torch.Tensor:
        from lmcache.kernels.sparse_attention import sparse_attention

        q = _dense_heads(q)
        attended, _ = sparse_attention(
            q,
            self.kv.part(keys),
            mask.positions_int32,
            sliding_window=mask.sliding_window,
            known=mask.known,
            seen_by_all=self._seen_by_all(q, keys, mask, scoring),
            **scoring._asdict(),
        )
        return attended

    def _seen_by_all(self, q: torch.Tensor, keys: slice, mask: QueryMask, scoring: Scoring) -> SeenByAll | None:
        """The part that the engine's own attention computes, if it can."""
        from lmcache.kernels.sparse_attention import SeenByAll

        runs = self._pages.runs(keys, mask, scoring)
        if runs is None:
            return None
        assert self._pages.dense is not None
        out, lse = self._pages.dense(q, self.kv.keys, self.kv.values, runs, scoring.scale)
        return SeenByAll(RUN_TOKENS, runs.keys, out, lse)

    def attention_received(self, q: torch.Tensor, keys: slice, mask: QueryMask, scoring: Scoring) -> torch.Tensor:
        from lmcache.kernels.attention_received import attention_received

        return attention_received(
            _dense_heads(q),
            self.kv.part(keys),
            mask.positions_int32,
            sliding_window=mask.sliding_window,
            known=mask.known,
            **scoring._asdict(),
        )

    # What a corrector of many rows reads and writes

    @property
    def kernel_rows(self) -> KVRows:
        return self.kv

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from lmcache.kernels.kv_read import read

        return read(self.kv, rows)

    def add(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        from lmcache.kernels.kv_write import write

        write(keys, values, rows, self.kv, add=True)


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
    ) -> None:
        """``slots``: int64 ``[N]`` on the CPU, one for every row of the batch. ``exact``: bool ``[N]``, rows whose KV
        is in the pages and stays as it is, whatever is computed. ``dense``: the engine's own attention."""
        from lmcache.blend.page_rows import page_offsets, page_rows

        super().__init__(batch, ropes, corrector)
        layout = connector.kv_layout
        self._connector = connector
        self._sent = OnDevice(ring.device, exact)
        self._pages = PromptPages(slots, layout.block_size, ring.device, dense)
        offsets = page_offsets(layout, slots).to(ring.device)
        self._planes = [layout.plane_views(connector.tensors, layer) for layer in range(len(ropes))]
        self._kv = page_rows(layout, self._planes[0][0], self._planes[0][1], offsets)
        self._moved = [placed for placed in batch.placed if not placed.span.exact]
        spans = [np.arange(*placed.rows) for placed in self._moved]
        self._rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *spans]))
        self._staged = StagedLayers(self._moved, len(ropes), (layout.num_heads, layout.head_dim), layout.dtype, ring)
        self._froms = self._staged.k_from.to(ring.device), self._staged.v_from.to(ring.device)
        self._turns: dict[int, Turns] = {}

    def load(self, layer_id: int, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        from lmcache.kernels.kv_write import place

        layer = PagedLayer(layer_id, self._kv.at(*self._planes[layer_id][:2]), self._sent, self._pages)
        if not self._moved:
            return layer
        try:
            staged = self._staged.layer(layer_id)
        except SourceError as error:
            raise PromptLoadError(error.prompt, str(error)) from error
        sent = self._sent
        k_from, v_from = self._froms
        place(staged, k_from, v_from, sent.rows(self._rows), layer.kv, self._turns_of(self.ropes[layer_id]))
        self._staged.done(layer_id)
        return layer

    def _turns_of(self, rope: FusedRope | None) -> Turns | None:
        """How far each of the moved rows turns; layers with one rope share it."""
        from lmcache.kernels.kv_write import Turns

        if rope is None:
            return None
        if id(rope) not in self._turns:
            tables, numbers, count = [], [], 0
            for placed in self._moved:
                table, gain = self._angles(rope, placed)
                num_rows = placed.rows[1] - placed.rows[0]
                numbers.append(torch.arange(num_rows) + count if len(table) > 1 else torch.full((num_rows,), count))
                count += len(table)
                tables.append(torch.stack([table.cos() * gain, table.sin() * gain]).to(torch.float32))
            cos, sin = torch.cat(tables, 1).to(self._sent.device).unbind(0)
            of_row = torch.cat(numbers).to(torch.int32).to(self._sent.device)
            self._turns[id(rope)] = Turns(cos, sin, of_row, rope.is_neox_style)
        return self._turns[id(rope)]

    def _angles(self, rope: FusedRope, placed: PlacedSpan) -> tuple[torch.Tensor, float]:
        span, (start, end) = placed.span, placed.rows
        new = self.batch.positions[start:end]
        lengths = placed.source.length, self.batch.plans[placed.prompt].num_tokens
        return rope.turn(new + (span.old_start - span.start), new, *lengths)

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
        k, v = _dense_heads(k), _dense_heads(v)
        if isinstance(self.corrector, BatchedCorrector):
            self.corrector.correct_rows(RowCorrection(layer.layer_id, layer, rows, k, v, spans, memo))
            return
        every_row = memo.setdefault("every row", torch.arange(self.batch.num_rows))
        keys, values = layer.read(self._sent.rows(every_row))
        self.corrector.correct(
            LayerCorrection(
                layer_id=layer.layer_id,
                keys=keys,
                values=values,
                rows=memo.setdefault("rows", rows.to(k.device)),
                fresh_keys=k,
                fresh_values=v,
                spans=spans,
                positions=memo.setdefault("positions", self.batch.positions.to(k.device)),
                rope=self.ropes[layer.layer_id],
                memo=memo,
            )
        )
        from lmcache.kernels.kv_write import write

        moved = memo.get(("moved", spans))
        if moved is None:
            moved = memo["moved", spans] = torch.cat([torch.arange(*span) for span in spans]).to(k.device)
        write(keys[moved], values[moved], moved.to(torch.int32), layer.kv)

    def let_go(self, layer: LayerKV) -> None:
        """It stays in the pages."""

    def tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [], []


def can_blend_in_pages(connector: PagedConnector, ropes: Sequence[FusedRope | None]) -> bool:
    """Whether kernels can blend in these pages."""
    from lmcache.kernels.availability import kernels_for

    layout = connector.kv_layout
    return (
        kernels_for(connector.tensors[0].device)
        and len(layout.planes) == 2
        and layout.planes[0].strides == layout.planes[1].strides
        and layout.planes[0].strides[3] == 1
        and layout.head_dim <= 256
        and layout.dtype in _DTYPES
        and not any(rope is not None and rope.rotary_at_end for rope in ropes)
    )


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where the elements of a head lie one after the other."""
    return x if x.stride(-1) == 1 else x.contiguous()
