"""The forwards of a blend. Each runs the host's model on some rows; everything happens in its ``attend``.

Rows may go through several forwards: a policy looks first, then what it chose is computed from the first layer on. What
an earlier forward computed stays in the KV, so a later one finds the layers that it stands on already right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import ClassVar, NamedTuple, TypeAlias, TypeVar

import torch

from lmcache.blend.attention import Scoring
from lmcache.blend.batch import BlendBatch
from lmcache.blend.early_rows import EarlyRows
from lmcache.blend.host import BlendHost, StopForward, have_in_place
from lmcache.blend.layer_kv import BatchKV, LayerKV
from lmcache.blend.pieces import Piece, cut_rows
from lmcache.blend.selection import DeviationTensor

Output = TypeVar("Output")

OnLayer: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Takes a layer's number and its final K and V, ``[N, kv_heads, dim]`` of the whole batch."""

# More take a GPU longer than the host.
_MOST_ALIKE_ROWS = 2048


class Fresh(NamedTuple):
    """What the host computed for the forward's rows in one layer; see :class:`lmcache.blend.host.Attend`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scoring: Scoring
    sliding_window: int | None
    out: torch.Tensor | None = None


class BlendForward(ABC):
    """One forward over the rows that are True in ``computed`` (bool ``[N]``).

    ``alike``: :meth:`take` does the same in every layer.

    With ``max_rows`` it is run in pieces of at most so many rows, in order: a row looks at nothing behind it, so a
    later piece finds all that it needs.
    """

    alike: ClassVar[bool] = True

    def __init__(
        self,
        batch: BlendBatch,
        kv: BatchKV,
        computed: torch.Tensor,
        max_rows: int | None = None,
        ends_at: int | None = None,
    ) -> None:
        """``ends_at``: the layer of which no attention is wanted, and nothing behind it; None: none."""
        self.batch = batch
        self.kv = kv
        self.ends_at = ends_at
        # Rows that are neither computed nor reused mean nothing, and are not looked at.
        known = computed | batch.reusable | batch.exact
        rows = torch.nonzero(computed)[:, 0]
        self.pieces: list[Piece] = []
        begin = 0
        for start, end in cut_rows(rows, batch.edges, max_rows):
            last = end == len(rows)
            stop = batch.num_rows if last else int(rows[end])
            self.pieces.append(Piece(batch, rows[start:end], known, (begin, stop), last))
            begin = stop

    def run(self, host: BlendHost[Output]) -> Output | None:
        """What the host gives for the last piece; None when that was stopped before its end."""
        *_, output = self.steps(host)
        return output

    def steps(self, host: BlendHost[Output]) -> Iterator[Output | None]:
        """:meth:`run`, a call of the host a step."""
        for piece in self.pieces:
            try:
                output = host.forward(piece.rows, piece.positions, partial(self._attend, piece))
            except StopForward:
                output = None
            yield output

    def _attend(
        self,
        piece: Piece,
        layer_id: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`lmcache.blend.host.Attend`."""
        fresh = Fresh(q, k, v, Scoring(scale, softcap, sinks), sliding_window, out)
        self.get_ready(piece, fresh, layer_id)
        layer = self.kv.layer(layer_id, k, v)
        take, attention = partial(self.take, piece, fresh), partial(self._attention, piece, fresh)
        if layer_id == self.ends_at:
            take(layer)
            self.leave(piece, layer, fresh)
            raise StopForward
        if (kind := self._kind(piece, fresh)) is None:
            take(layer)
            attended = attention(layer)
        else:
            attended = self.kv.run_alike(kind, layer, take, attention)
        self.leave(piece, layer, fresh)
        return attended

    def _kind(self, piece: Piece, fresh: Fresh) -> Hashable | None:
        """The same for layers in which the same work is to be done; None where it is never the same."""
        if not self.alike or fresh.scoring.sinks is not None or len(fresh.q) > _MOST_ALIKE_ROWS:
            return None
        # Kernels are given addresses: work is alike only where the fresh rows lie in the same memory.
        where = [(x.data_ptr(), x.stride()) for x in (fresh.q, fresh.k, fresh.v, fresh.out) if x is not None]
        return piece.number, fresh.scoring, fresh.sliding_window, *where

    def _attention(self, piece: Piece, fresh: Fresh, layer: LayerKV) -> torch.Tensor:
        q, masks = fresh.q, piece.masks(fresh.sliding_window, fresh.q.device)
        if len(piece.parts) == 1:
            return layer.attention(q, piece.parts[0].keys, masks[0], fresh.scoring, fresh.out)
        out = q.new_empty(*q.shape[:2], fresh.v.shape[-1]) if fresh.out is None else fresh.out
        for part, mask in zip(piece.parts, masks, strict=True):
            place = out[part.queries]
            have_in_place(layer.attention(q[part.queries], part.keys, mask, fresh.scoring, place), place)
        return out

    def get_ready(self, piece: Piece, fresh: Fresh, layer_id: int) -> None:  # noqa: B027 - not every forward corrects
        """What :meth:`take` needs and what does not hang on fresh rows."""

    @abstractmethod
    def take(self, piece: Piece, fresh: Fresh, layer: LayerKV) -> None:
        """Put the fresh rows into ``layer``, before its attention."""

    def leave(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> None:  # noqa: B027 - some have nothing to do
        """``layer`` is as it will be seen by what comes: look at what this forward is run for."""


class Recompute(BlendForward):
    """The forward that counts: what is not computed is corrected, what is computed overwrites it.

    ``early`` (bool ``[N]``): rows that an earlier forward has computed for good, see :class:`EarlyRows`.

    ``on_layer(layer_id, keys, values)`` is given each layer when it is final, which is then let go.
    """

    def __init__(
        self,
        batch: BlendBatch,
        kv: BatchKV,
        computed: torch.Tensor,
        max_rows: int | None = None,
        on_layer: OnLayer | None = None,
        ends_at: int | None = None,
        early: torch.Tensor | None = None,
    ) -> None:
        super().__init__(batch, kv, computed, max_rows, ends_at)
        self._on_layer = on_layer
        self._early = {} if early is None else {piece: EarlyRows(piece, early) for piece in self.pieces}

    def get_ready(self, piece: Piece, fresh: Fresh, layer_id: int) -> None:
        early = self._early.get(piece)
        rows = piece.rows if early is None else early.rows
        self.kv.get_ready(layer_id, rows, fresh.k.dtype, piece.covers, piece.memo)

    def take(self, piece: Piece, fresh: Fresh, layer: LayerKV) -> None:
        rows, k, v = piece.rows, fresh.k, fresh.v
        if (early := self._early.get(piece)) is not None:
            rows = early.rows
            k, v = early.joined(layer, k, v)
        self.kv.correct(layer, rows, k, v, piece.covers, piece.memo)
        layer.write(rows, k, v)

    def leave(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> None:
        if self._on_layer is not None and piece.last:
            self._on_layer(layer.layer_id, layer.keys, layer.values)
            self.kv.let_go(layer)


class MeasureDeviation(Recompute):
    """Recomputes up to layer ``ends_at`` and compares there. ``deviation`` is float32 ``[N]``, −inf elsewhere."""

    alike = False

    def __init__(
        self,
        batch: BlendBatch,
        kv: BatchKV,
        computed: torch.Tensor,
        ends_at: int,
        tensor: DeviationTensor,
        max_rows: int | None = None,
    ) -> None:
        super().__init__(batch, kv, computed, max_rows, ends_at=ends_at)
        self._tensor = tensor
        self.deviation = torch.full((batch.num_rows,), -torch.inf)

    def take(self, piece: Piece, fresh: Fresh, layer: LayerKV) -> None:
        layer.measure(piece.rows, fresh.k, fresh.v)
        super().take(piece, fresh, layer)

    def leave(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> None:
        if layer.layer_id == self.ends_at and piece.last:
            self._read(layer)

    def _read(self, layer: LayerKV) -> None:
        computed = torch.cat([piece.rows for piece in self.pieces])
        for start, end in self.batch.prompts:
            rows = computed[(computed >= start) & (computed < end)]
            rows = rows[self.batch.reusable[rows]]
            layer.read_change()
            changes = [layer.change[name][rows] for name in self._tensor]
            if len(changes) > 1:
                # K and V differ in size: together, each counts in units of its own mean.
                changes = [change / change.mean().clamp_min(1e-30) for change in changes]
            self.deviation[rows] = torch.stack(changes).sum(0)
