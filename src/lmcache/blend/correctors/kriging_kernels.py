"""Kriging of a blend's pieces by kernels: what hangs on moved keys alone is done for several layers at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmcache.kernels.kriging import Pieces, krige_shift, krige_weights
from lmcache.memory.to_device import to_device

if TYPE_CHECKING:
    from lmcache.blend.correctors.interface import RowCorrection, RowsAhead
    from lmcache.blend.correctors.kriging_rows import Covariance, Piece
    from lmcache.kernels.kv_rows import KVRows

# Short prompts leave most of a GPU idle: the matrices of 4,096 tokens take as long in eight layers as in one. Long ones
# fill it, and their first layers should not wait for the KV of others.
_ROWS_AT_ONCE, _MOST_LAYERS = 32768, 8


class KernelKriging:
    """A :class:`lmcache.blend.correctors.kriging_rows.PieceKriging`."""

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
        fresh, is_fresh = to_device(rows.to(torch.int32), device), to_device(is_fresh, device)
        self._batches: list[Pieces] = []
        for batch in batches:
            # Each row begins at a multiple of 16 bytes: kernels are compiled once for all numbers of pieces.
            numbers = np.zeros((4, -(-len(batch) // 4) * 4), dtype=np.int32)
            numbers[:, : len(batch)] = np.array(batch, dtype=np.int32).T
            _, longest, _, most = numbers.max(1).tolist()
            starts, lengths, firsts, counts = to_device(torch.from_numpy(numbers), device)[:, : len(batch)].unbind(0)
            self._batches.append(Pieces(starts, lengths, firsts, counts, fresh, is_fresh, longest, most))
        self._constants = asdict(of)
        self._at_once = max(1, min(_MOST_LAYERS, _ROWS_AT_ONCE // num_rows))
        self._in_layers: dict[int, list[Pieces]] = {}
        self._group = range(0)
        self._of_group: list[torch.Tensor] = []
        # Where a replayed shift finds the weights of whatever layer it is replayed for.
        self._weights: list[torch.Tensor] = []
        self._ready_for = -1

    def get_ready(self, ahead: RowsAhead) -> None:
        """Have the weights of ``ahead`` in place."""
        if ahead.layer_id in self._group:
            at = ahead.layer_id - self._group.start
            for weights, pieces, of_group in zip(self._weights, self._batches, self._of_group, strict=True):
                count = len(pieces.start)
                weights.copy_(of_group[at * count : (at + 1) * count])
            self._ready_for = ahead.layer_id
            return
        layers = ahead.layers(self._at_once)
        together = _one_after_the_other(layers) if len(layers) > 1 else None
        if together is None:
            self._weigh(layers[0], ahead.layer_id)
            return
        if len(layers) not in self._in_layers:
            self._in_layers[len(layers)] = [pieces.in_layers(len(layers)) for pieces in self._batches]
        in_layers = self._in_layers[len(layers)]
        self._make_room(layers[0])
        self._of_group = [krige_weights(together, pieces, **self._constants) for pieces in in_layers]
        self._group = range(ahead.layer_id, ahead.layer_id + len(layers))
        self.get_ready(ahead)

    def correct(self, layer: RowCorrection) -> None:
        if self._ready_for != layer.layer_id:
            self._weigh(layer.kv.kernel_rows, layer.layer_id)
        for pieces, weights in zip(self._batches, self._weights, strict=True):
            krige_shift(layer.kv.kernel_rows, pieces, weights, layer.fresh_keys, layer.fresh_values)

    def _weigh(self, kv: KVRows, layer_id: int) -> None:
        self._make_room(kv)
        for pieces, weights in zip(self._batches, self._weights, strict=True):
            krige_weights(kv, pieces, **self._constants, out=weights)
        self._ready_for = layer_id

    def _make_room(self, kv: KVRows) -> None:
        if not self._weights:
            self._weights = [pieces.room_for_weights(kv.keys.dtype) for pieces in self._batches]


def _one_after_the_other(layers: Sequence[KVRows]) -> KVRows | None:
    """The rows of all ``layers`` as those of one; their values are the first layer's. None where they do not lie in
    whole steps of the rows' alignment."""
    first = layers[0]
    nbytes = [layer.keys.data_ptr() - first.keys.data_ptr() for layer in layers]
    if any(distance % (first.alignment * first.keys.element_size()) for distance in nbytes):
        return None
    distances = torch.tensor([distance // first.keys.element_size() for distance in nbytes])
    offsets = to_device(distances, first.offsets.device)[:, None] + first.offsets
    return replace(first, offsets=offsets.flatten())
