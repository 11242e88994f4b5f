"""The forwards of a blend. Each runs the host's model on some rows; everything happens in its ``attend``.

Rows may go through several forwards: a policy looks first, then what it chose is computed from the first layer on. What
an earlier forward computed stays in the KV, so a later one finds the layers that it stands on already right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

import torch

from lmcache.blend.attention import QueryMask, Scoring
from lmcache.blend.batch import BlendBatch
from lmcache.blend.early_rows import EarlyRows
from lmcache.blend.host import BlendHost, StopForward
from lmcache.blend.layer_kv import BatchKV, LayerKV
from lmcache.blend.pieces import Part, Piece, cut_rows
from lmcache.blend.selection import DeviationTensor, HeadReduction

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


class BlendForward(ABC):
    """One forward over the rows that are True in ``computed`` (bool ``[N]``).

    With ``max_rows`` it is run in pieces of at most so many rows, in order: a row looks at nothing behind it, so a
    later piece finds all that it needs.
    """

    def __init__(self, batch: BlendBatch, kv: BatchKV, computed: torch.Tensor, max_rows: int | None = None) -> None:
        self.batch = batch
        self.kv = kv
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
    ) -> torch.Tensor:
        """See :class:`lmcache.blend.host.Attend`."""
        layer = self.kv.layer(layer_id, k, v)
        fresh = Fresh(q, k, v, Scoring(scale, softcap, sinks), sliding_window)

        def work(layer: LayerKV) -> torch.Tensor:
            self.take(piece, layer, fresh)
            return self._attention(piece, layer, fresh)

        group = self.group(layer_id)
        if group is None or sinks is not None or len(q) > _MOST_ALIKE_ROWS:
            out = work(layer)
        else:
            # Kernels are given addresses: work is alike only where the fresh rows lie in the same memory.
            where = [(x.data_ptr(), x.stride()) for x in (q, k, v)]
            kind = (piece.number, group, scale, sliding_window, softcap, *where)
            out = self.kv.run_alike(kind, layer, work)
        self.leave(piece, layer)
        return out

    def _attention(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> torch.Tensor:
        q, masks = fresh.q, piece.masks(fresh.sliding_window, fresh.q.device)
        if len(piece.parts) == 1:
            return layer.attention(q, piece.parts[0].keys, masks[0], fresh.scoring)
        out = q.new_empty(*q.shape[:2], fresh.v.shape[-1])
        for part, mask in zip(piece.parts, masks, strict=True):
            out[part.queries] = layer.attention(q[part.queries], part.keys, mask, fresh.scoring)
        return out

    @abstractmethod
    def take(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> None:
        """Put the fresh rows into ``layer`` and look at what this forward is run for, before its attention."""

    def group(self, layer_id: int) -> Hashable | None:
        """Layers of one group are treated alike; None: this one by itself."""
        return None

    def leave(self, piece: Piece, layer: LayerKV) -> None:  # noqa: B027 - most forwards have nothing to do
        """The attention of ``layer`` is computed for ``piece``."""


class Recompute(BlendForward):
    """The forward that counts: what is not computed is corrected, what is computed overwrites it.

    ``early`` (bool ``[N]``): rows that an earlier forward has computed for good, see :class:`EarlyRows`.

    ``on_layer(layer_id, keys, values)`` is given each layer when it is final, which is then let go. With ``last_layer``
    only KV is wanted, up to that layer: the forward stops when it is in place.
    """

    def __init__(
        self,
        batch: BlendBatch,
        kv: BatchKV,
        computed: torch.Tensor,
        max_rows: int | None = None,
        on_layer: OnLayer | None = None,
        last_layer: int | None = None,
        early: torch.Tensor | None = None,
    ) -> None:
        super().__init__(batch, kv, computed, max_rows)
        self._on_layer = on_layer
        self._last_layer = last_layer
        self._early = {} if early is None else {piece: EarlyRows(piece, early) for piece in self.pieces}

    def take(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> None:
        rows, k, v = piece.rows, fresh.k, fresh.v
        if (early := self._early.get(piece)) is not None:
            rows, k, v = early.joined(layer, k, v)
        self.kv.correct(layer, rows, k, v, piece.covers, piece.memo)
        layer.write(rows, k, v)
        if layer.layer_id == self._last_layer:
            self.leave(piece, layer)
            raise StopForward

    def group(self, layer_id: int) -> Hashable | None:
        return None if layer_id == self._last_layer else "recompute"

    def leave(self, piece: Piece, layer: LayerKV) -> None:
        if self._on_layer is not None and piece.last:
            self._on_layer(layer.layer_id, layer.keys, layer.values)
            self.kv.let_go(layer)


class MeasureDeviation(Recompute):
    """Recomputes up to ``last_layer``, compares there, and stops. ``deviation`` is float32 ``[N]``, −inf elsewhere."""

    def __init__(
        self,
        batch: BlendBatch,
        kv: BatchKV,
        computed: torch.Tensor,
        last_layer: int,
        tensor: DeviationTensor,
        max_rows: int | None = None,
    ) -> None:
        super().__init__(batch, kv, computed, max_rows, last_layer=last_layer)
        self._tensor = tensor
        self.deviation = torch.full((batch.num_rows,), -torch.inf)

    def take(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> None:
        layer.measure(piece.rows, fresh.k, fresh.v)
        super().take(piece, layer, fresh)

    def group(self, layer_id: int) -> Hashable | None:
        return None

    def leave(self, piece: Piece, layer: LayerKV) -> None:
        if layer.layer_id == self._last_layer and piece.last:
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


class ScoreAttention(BlendForward):
    """Lets the end of each prompt look at the moved KV, and adds up what each row receives.

    Who looks: the computed rows among the last ``span`` of a prompt. ``received`` is float32 ``[N]``, averaged over
    ``layers`` once the forward has run.

    With ``correct_up_to`` the computed rows are there to stay: up to that layer, the model's last, others are corrected
    by them.
    """

    def __init__(
        self,
        batch: BlendBatch,
        kv: BatchKV,
        computed: torch.Tensor,
        *,
        span: int,
        layers: Sequence[int],
        heads: HeadReduction,
        correct_up_to: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        super().__init__(batch, kv, computed, max_rows)
        self._span = span
        self._layers = frozenset(layers)
        self._corrects = correct_up_to is not None
        self._last_layer = max(layers) if correct_up_to is None else correct_up_to
        self._heads = heads
        self._query_masks: dict[tuple[Piece, int | None], list[QueryMask]] = {}
        self._received: torch.Tensor | None = None

    def take(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> None:
        if self._corrects:
            self.kv.correct(layer, piece.rows, fresh.k, fresh.v, piece.covers, piece.memo)
        layer.write(piece.rows, fresh.k, fresh.v)
        if layer.layer_id in self._layers:
            self._look(piece, layer, fresh)
        if layer.layer_id == self._last_layer:
            raise StopForward

    def _look(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> None:
        asking_parts = [
            (part, asking) for part in piece.parts if (asking := self._asking(piece, part)).start < asking.stop
        ]
        window = fresh.sliding_window
        if (piece, window) not in self._query_masks:
            self._query_masks[piece, window] = [
                piece.mask(part, asking, window, fresh.q.device) for part, asking in asking_parts
            ]
        for (part, asking), mask in zip(asking_parts, self._query_masks[piece, window], strict=True):
            by_head = layer.attention_received(fresh.q[asking], part.keys, mask, fresh.scoring)
            score = by_head.mean(0) if self._heads == "mean" else by_head.amax(0)
            if self._received is None:
                self._received = torch.zeros(self.batch.num_rows, device=score.device)
            # Where pieces cut the end of a prompt, each asks for its share.
            share = (asking.stop - asking.start) / self._num_asking(part)
            self._received[part.keys] += share / len(self._layers) * score

    def group(self, layer_id: int) -> Hashable | None:
        return None if layer_id == self._last_layer else layer_id in self._layers

    @property
    def received(self) -> torch.Tensor:
        """On the CPU: the one time that an accelerator is waited for."""
        return torch.zeros(self.batch.num_rows) if self._received is None else self._received.cpu()

    def _asking(self, piece: Piece, part: Part) -> slice:
        first = int(torch.searchsorted(piece.rows, part.keys.stop - self._span))
        return slice(max(first, part.queries.start), part.queries.stop)

    def _num_asking(self, part: Part) -> int:
        end = part.keys.stop
        return sum(int(((piece.rows >= end - self._span) & (piece.rows < end)).sum()) for piece in self.pieces)
