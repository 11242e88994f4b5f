"""Kriging of a blend's pieces by kernels: what hangs on moved keys alone is done for several layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmcache.kernels.kriging import Pieces, krige_weights
from lmcache.kernels.kriging_shift import changes_of, krige_shift
from lmcache.kernels.kv_rows import KVLayers
from lmcache.memory.to_device import ints_to_device, to_device

if TYPE_CHECKING:
    from lmcache.blend.correctors.interface import RowCorrection, RowsAhead
    from lmcache.blend.correctors.kriging_rows import Covariance, Piece

# Short prompts leave most of a GPU idle: the matrices of 4,096 tokens take as long in eight layers as in one. Long ones
# fill it, and where KV is still on its way their first layers should not wait for that of others. Each group costs the
# host 0.7 ms (beside an H200): twelve layers of 4,096 tokens, six of 8,192, three of 16,384 and one of 32,768.
_ROWS_AT_ONCE, _ROWS_IN_PLACE, _MOST_LAYERS = 50 * 1024, 264 * 1024, 12


class KernelKriging:
    """Corrects some pieces, layer by layer."""

    def __init__(
        self,
        batches: Iterable[Sequence[Piece]],
        rows: torch.Tensor,
        num_rows: int,
        device: torch.device,
        of: Covariance,
    ) -> None:
        """``rows``: the fresh ones, int64, on the CPU, of ``num_rows``."""
        is_fresh = torch.zeros(num_rows, dtype=torch.uint8)
        is_fresh[rows] = 1
        columns = [column for batch in batches for column in np.array(batch).T]
        self._fresh, *sent = ints_to_device([rows.numpy(), *columns], device)
        is_fresh = to_device(is_fresh, device)
        self._batches: list[Pieces] = []
        for at in range(0, len(columns), 4):
            _, longest, _, most = (int(column.max()) for column in columns[at : at + 4])
            start, length, first, count = sent[at : at + 4]
            self._batches.append(Pieces(start, length, first, count, self._fresh, is_fresh, longest, most))
        self._constants = asdict(of)
        self._num_rows = num_rows
        self._layers: Callable[[int, int], KVLayers] | None = None
        self._at_once = 1
        self._group = range(0)
        # Of all layers of a group. A shift that is replayed for each of them finds out by itself which one it is at.
        self._weights: list[torch.Tensor] = []
        self._at: torch.Tensor | None = None
        self._ready_for = -1

    def look_ahead(self, ahead: RowsAhead) -> None:
        """From now on :meth:`get_ready` is called before a layer is corrected, once."""
        rows = _ROWS_IN_PLACE if ahead.in_place else _ROWS_AT_ONCE
        self._at_once = max(1, min(_MOST_LAYERS, rows // self._num_rows))
        # Not all of it: its memo holds this object.
        self._layers = ahead.layers
        self._make_room(ahead.dtype)

    def get_ready(self, layer_id: int) -> None:
        """Have the weights of a layer in place."""
        assert self._layers is not None
        begins = layer_id not in self._group
        if begins:
            layers = self._layers(layer_id, self._at_once)
            self._group = range(layer_id, layer_id + layers.num_layers)
            self._weigh(layers)
        if self._at is not None and (begins or layer_id != self._ready_for + 1):
            self._at.fill_(layer_id - self._group.start)
        self._ready_for = layer_id

    def correct(self, layer: RowCorrection) -> None:
        if self._ready_for != layer.layer_id:
            self._make_room(layer.fresh_keys.dtype)
            self._weigh(KVLayers(layer.kv.kernel_rows, None))
            self._group = range(layer.layer_id, layer.layer_id + 1)
            if self._at is not None:
                self._at.zero_()
            self._ready_for = layer.layer_id
        kv = layer.kv.kernel_rows
        changes = changes_of(kv, self._fresh, layer.fresh_keys, layer.fresh_values)
        for pieces, weights in zip(self._batches, self._weights, strict=True):
            krige_shift(kv, pieces, weights, changes, self._at)
        if self._at is not None:
            self._at.add_(1)

    def _weigh(self, kv: KVLayers) -> None:
        for pieces, weights in zip(self._batches, self._weights, strict=True):
            krige_weights(kv, pieces, weights[: kv.num_layers * len(pieces.start)], **self._constants)

    def _make_room(self, dtype: torch.dtype) -> None:
        if not self._weights:
            self._weights = [pieces.room_for_weights(dtype, self._at_once) for pieces in self._batches]
            # Also where one layer is done at a time: kernels are compiled for whether it is there.
            if self._layers is not None:
                self._at = torch.empty(1, dtype=torch.int64, device=self._weights[0].device)
