"""Staged layers on their last step: from the staging ring into the pages, their keys turned on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmcache.blend.batch import BlendBatch, PlacedSpan
from lmcache.blend.rope import FusedRope
from lmcache.blend.staged_layers import StagedLayers
from lmcache.memory.to_device import to_device

if TYPE_CHECKING:
    from lmcache.kernels.kv_rows import KVLayers, KVRows
    from lmcache.kernels.kv_write import Turns


class PlaceLayers:
    """Places the rows of ``moved`` spans, layer by layer or several layers with one launch."""

    def __init__(
        self,
        staged: StagedLayers,
        moved: Sequence[PlacedSpan],
        batch: BlendBatch,
        ropes: Sequence[FusedRope | None],
        device: torch.device,
    ) -> None:
        """All index tensors are sent at once: before the layers, which fill the way to the device for milliseconds."""
        self._staged = staged
        self._moved = moved
        self._batch = batch
        self._ropes = ropes
        self._device = device
        self._turns: dict[int, Turns | None] = {}
        spans = [np.arange(*placed.rows) for placed in moved]
        rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *spans]).astype(np.int32))
        self._rows = to_device(rows, device)
        self._k_from, self._v_from = (to_device(where, device) for where in (staged.k_from, staged.v_from))
        for rope in ropes if moved else ():
            if id(rope) not in self._turns:
                self._turns[id(rope)] = None if rope is None else self._turns_of(rope)

    def one(self, layer_id: int, kv: KVRows) -> None:
        """Raises:
        lmcache.blend.staged_layers.SourceError: a source failed.
        """
        self._place(self._staged.layer(layer_id), self._ropes[layer_id], kv)
        self._staged.done(layer_id)

    def together(self, first: int, layers: KVLayers) -> bool:
        """Place consecutive layers, ``first`` and those behind it, with one launch; False where that cannot be.

        Raises:
            lmcache.blend.staged_layers.SourceError: a source failed.
        """
        count, rope = layers.num_layers, self._ropes[first]
        if any(other is not rope for other in self._ropes[first : first + count]):
            return False
        staged = self._staged.together(first, count)
        if staged is None:
            return False
        self._place(staged, rope, layers.rows, layers.distances)
        self._staged.done(first, count)
        return True

    def _place(
        self, staged: torch.Tensor, rope: FusedRope | None, kv: KVRows, distances: torch.Tensor | None = None
    ) -> None:
        from lmcache.kernels.kv_write import place

        # fp8 is staged as bytes
        staged = staged if staged.dtype == kv.keys.dtype else staged.view(kv.keys.dtype)
        place(staged, self._k_from, self._v_from, self._rows, kv, self._turns[id(rope)], distances)

    def _turns_of(self, rope: FusedRope) -> Turns:
        """How far each of the moved rows turns; layers with one rope share it."""
        from lmcache.kernels.kv_write import Turns

        turned, numbers = self._turned_singly(rope) if rope.depends_on_length else self._turned_by_distance(rope)
        cos, sin = to_device(turned.to(torch.float32), self._device).unbind(0)
        return Turns(cos, sin, to_device(numbers.to(torch.int32), self._device), rope.is_neox_style)

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
            new = self._batch.positions[start:end]
            lengths = placed.source.length, self._batch.plans[placed.prompt].num_tokens
            angles, gain = rope.turn(new + (span.old_start - span.start), new, *lengths)
            numbers.append(torch.arange(end - start) + count if len(angles) > 1 else torch.full((end - start,), count))
            count += len(angles)
            tables.append(torch.stack([angles.cos() * gain, angles.sin() * gain]))
        return torch.cat(tables, 1), torch.cat(numbers)
