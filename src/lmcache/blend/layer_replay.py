"""The work of one layer in an engine's pages, recorded once and replayed for the layers that are like it.

A blend starts a dozen kernels a layer for correction and attention. They are the same in all layers but for where the
layer's pages lie, so the recorded ones go by offsets that are counted from the first layer's pages, in memory that the
first of them overwrites: one graph a layer in place of all. Scales of fp8 pages go the same way, by a copy before it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from lmcache.blend.fp8_pages import scales_in
from lmcache.blend.graph_recorder import Recording, WorkRecorder
from lmcache.blend.paged_layer import PagedLayer

if TYPE_CHECKING:
    from lmcache.kernels.kv_rows import KVRows

Take: TypeAlias = Callable[[PagedLayer], None]
Attention: TypeAlias = Callable[[PagedLayer], torch.Tensor]


@dataclass(frozen=True)
class _Recorded:
    """``views`` has the layer as the recorded work has left it last. ``advances``: it begins by going on to the offsets
    of the next layer; otherwise it finds those that other work on the same layer has left."""

    recording: Recording
    views: list[PagedLayer]
    advances: bool


class LayerReplays:
    """Those of one blend."""

    def __init__(
        self, recorder: WorkRecorder, distances: torch.Tensor, rows: KVRows, scales: torch.Tensor | None = None
    ) -> None:
        """``distances[l]`` (int64, on the device): how far layer ``l`` lies behind the one of ``rows``, in elements.
        ``scales``: the :attr:`lmcache.blend.fp8_pages.Fp8Pages.table`, None where no layer has others than ``rows``."""
        from lmcache.kernels.next_layer import compile_for, layer_counter

        compile_for(rows.offsets.device)

        self._recorder = recorder
        self._distances = distances
        self._first_layer = rows.offsets
        self._rows = replace(rows, offsets=torch.empty_like(rows.offsets))
        self._counter = layer_counter(len(rows.offsets), rows.offsets.device)
        self._counter_at = -1
        self._offsets_of = -1
        self._scales = None if scales is None else scales.unbind(0)
        if scales is not None:
            self._scales_in_use = scales[0].clone()
            key_scale, value_scale = scales_in(self._scales_in_use)
            self._rows = replace(self._rows, key_scale=key_scale, value_scale=value_scale)
        self._seen: dict[Hashable, bool] = {}  # whether attention can be recorded
        self._recorded: dict[Hashable, _Recorded | None] = {}

    def run(self, kind: Hashable, layer: PagedLayer, take: Take, attention: Attention) -> torch.Tensor:
        """``take`` and ``attention`` on ``layer``. What they queue for any layer of this ``kind`` is the same but for
        the layer's pages; the engine's own attention goes by pages, and is called in each layer.

        The outcome may be overwritten by the next call.
        """
        kind = kind, layer.corrected_to
        # The first is not recorded: what is the same in all layers is made and sent then.
        if kind in self._seen and kind not in self._recorded:
            self._recorded[kind] = self._record(layer, take, attention if self._seen[kind] else None)
        recorded = self._recorded.get(kind)
        if recorded is None:
            take(layer)
            layer.used_engines_attention = False
            outcome = attention(layer)
            self._seen[kind] = not layer.used_engines_attention
            return outcome
        self._go_to(layer.layer_id, recorded)
        if self._scales is not None:
            self._scales_in_use.copy_(self._scales[layer.layer_id])
        replayed = recorded.recording.replay()
        layer.take_over(recorded.views[-1])
        return attention(layer) if replayed is None else replayed

    def _go_to(self, layer_id: int, recorded: _Recorded) -> None:
        """Have ``recorded`` work on this layer when it is replayed next. Layers in order need nothing queued."""
        if recorded.advances:
            if self._counter_at != layer_id:
                self._counter.fill_(layer_id)
            self._counter_at = layer_id + 1
        elif self._offsets_of != layer_id:
            torch.add(self._first_layer, self._distances[layer_id], out=self._rows.offsets)
        self._offsets_of = layer_id

    def _record(self, layer: PagedLayer, take: Take, attention: Attention | None) -> _Recorded | None:
        from lmcache.kernels.next_layer import next_layer

        corrected_to = layer.corrected_to
        views: list[PagedLayer] = []
        advances = self._offsets_of != layer.layer_id

        def on_view() -> torch.Tensor | None:
            if advances:
                next_layer(self._first_layer, self._distances, self._counter, self._rows.offsets)
            views.append(layer.at(self._rows, corrected_to))
            take(views[-1])
            return None if attention is None else attention(views[-1])

        recording = self._recorder.record(on_view)
        return None if recording is None else _Recorded(recording, views, advances)
