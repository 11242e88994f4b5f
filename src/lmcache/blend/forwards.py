"""The forwards of a blend. Each runs the host's model on some rows; everything happens in its ``attend``.

Rows may go through several forwards: a policy looks first, then what it chose is computed from the first layer on. What
an earlier forward computed stays in the KV, so a later one finds the layers that it stands on already right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

from lmcache.blend.attention import QueryMask, attention_received, sparse_attention
from lmcache.blend.batch import BlendBatch
from lmcache.blend.host import BlendHost, StopForward
from lmcache.blend.layer_kv import BatchKV, LayerKV
from lmcache.blend.selection import DeviationTensor, HeadReduction

Output = TypeVar("Output")


class Part(NamedTuple):
    """The rows of one prompt in a forward: ``queries`` counts the forward's rows, ``keys`` the batch's."""

    queries: slice
    keys: slice


class Scoring(NamedTuple):
    """How a layer turns q·k into weights; see :class:`lmcache.blend.host.Attend`."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


class Fresh(NamedTuple):
    """What the host computed for the forward's rows in one layer; see :class:`lmcache.blend.host.Attend`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scoring: Scoring
    sliding_window: int | None


class BlendForward(ABC):
    """One forward over the rows that are True in ``computed`` (bool ``[N]``)."""

    def __init__(self, batch: BlendBatch, kv: BatchKV, computed: torch.Tensor) -> None:
        self.batch = batch
        self.kv = kv
        self.rows = torch.nonzero(computed)[:, 0]
        # Rows that are neither computed nor reused mean nothing, and are not looked at.
        self._known = computed | batch.reusable | batch.exact
        self.positions = batch.positions[self.rows]
        edges = torch.searchsorted(self.rows, torch.tensor([*(start for start, _ in batch.prompts), batch.num_rows]))
        at = edges.tolist()
        self.parts = [
            Part(slice(at[index], at[index + 1]), slice(*rows))
            for index, rows in enumerate(batch.prompts)
            if at[index] < at[index + 1]
        ]
        self._masks: dict[int | None, list[QueryMask]] = {}

    def run(self, host: BlendHost[Output]) -> Output | None:
        """None when the forward was stopped before its end."""
        try:
            return host.forward(self.rows, self.positions, self.attend)
        except StopForward:
            return None

    def attend(
        self,
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
        scoring = Scoring(scale, softcap, sinks)
        self.take(layer, Fresh(q, k, v, scoring, sliding_window))
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for part, mask in zip(self.parts, self._masks_of(sliding_window, q.device), strict=True):
            out[part.queries] = sparse_attention(
                q[part.queries], layer.keys[part.keys], layer.values[part.keys], mask, **scoring._asdict()
            )
        return out

    @abstractmethod
    def take(self, layer: LayerKV, fresh: Fresh) -> None:
        """Put the fresh rows into ``layer`` and look at what this forward is run for, before its attention."""

    def mask(self, part: Part, queries: slice, sliding_window: int | None, device: torch.device) -> QueryMask:
        """For some of the forward's rows, of one prompt."""
        known = self._known[part.keys]
        return QueryMask(
            self.positions[queries].to(device), sliding_window, None if bool(known.all()) else known.to(device)
        )

    def _masks_of(self, sliding_window: int | None, device: torch.device) -> list[QueryMask]:
        """One a part, made once a window."""
        if sliding_window not in self._masks:
            self._masks[sliding_window] = [self.mask(part, part.queries, sliding_window, device) for part in self.parts]
        return self._masks[sliding_window]


class Recompute(BlendForward):
    """The forward that counts: what is not computed is corrected, what is computed overwrites it."""

    def take(self, layer: LayerKV, fresh: Fresh) -> None:
        self.kv.correct(layer, self.rows, fresh.k, fresh.v)
        layer.write(self.rows, fresh.k, fresh.v)


class MeasureDeviation(Recompute):
    """Recomputes up to ``last_layer``, compares there, and stops. ``deviation`` is float32 ``[N]``, −inf elsewhere."""

    def __init__(
        self, batch: BlendBatch, kv: BatchKV, computed: torch.Tensor, last_layer: int, tensor: DeviationTensor
    ) -> None:
        super().__init__(batch, kv, computed)
        self._last_layer = last_layer
        self._tensor = tensor
        self.deviation = torch.full((batch.num_rows,), -torch.inf)

    def take(self, layer: LayerKV, fresh: Fresh) -> None:
        layer.measure(self.rows, fresh.k, fresh.v)
        super().take(layer, fresh)
        if layer.layer_id == self._last_layer:
            self._read(layer)
            raise StopForward

    def _read(self, layer: LayerKV) -> None:
        for part in self.parts:
            rows = self.rows[part.queries]
            rows = rows[self.batch.reusable[rows]]
            changes = [layer.change[name][rows] for name in self._tensor]
            if len(changes) > 1:
                # K and V differ in size: together, each counts in units of its own mean.
                changes = [change / change.mean().clamp_min(1e-30) for change in changes]
            self.deviation[rows] = torch.stack(changes).sum(0)


class ScoreAttention(BlendForward):
    """Lets the end of each prompt look at the moved KV, and adds up what each row receives.

    Who looks: the computed rows among the last ``span`` of a prompt. ``received`` is float32 ``[N]``, averaged over
    ``layers`` once the forward has run.
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
    ) -> None:
        super().__init__(batch, kv, computed)
        self._span = span
        self._layers = frozenset(layers)
        self._last_layer = max(layers)
        self._heads = heads
        self._query_masks: dict[int | None, list[QueryMask]] = {}
        self.received = torch.zeros(batch.num_rows)

    def take(self, layer: LayerKV, fresh: Fresh) -> None:
        layer.write(self.rows, fresh.k, fresh.v)
        if layer.layer_id not in self._layers:
            return
        queries = [self._asking(part) for part in self.parts]
        window = fresh.sliding_window
        if window not in self._query_masks:
            self._query_masks[window] = [
                self.mask(part, asking, window, fresh.q.device)
                for part, asking in zip(self.parts, queries, strict=True)
            ]
        for part, asking, mask in zip(self.parts, queries, self._query_masks[window], strict=True):
            by_head = attention_received(fresh.q[asking], layer.keys[part.keys], mask, **fresh.scoring._asdict())
            score = by_head.mean(0) if self._heads == "mean" else by_head.amax(0)
            self.received[part.keys] += score.cpu() / len(self._layers)
        if layer.layer_id == self._last_layer:
            raise StopForward

    def _asking(self, part: Part) -> slice:
        first = int(torch.searchsorted(self.rows, part.keys.stop - self._span))
        return slice(max(first, part.queries.start), part.queries.stop)
