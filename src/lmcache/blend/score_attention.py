"""The forward that looks: how much attention each row of a prompt gets from its end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from lmcache.blend.attention import QueryMask
from lmcache.blend.batch import BlendBatch
from lmcache.blend.forwards import BlendForward, Fresh
from lmcache.blend.layer_kv import BatchKV, LayerKV
from lmcache.blend.pieces import Part, Piece
from lmcache.blend.selection import HeadReduction


class _Asking(NamedTuple):
    """The rows of a piece that look at their prompt, ``keys``. ``share``: of all that look at it, in all pieces."""

    queries: slice
    keys: slice
    mask: QueryMask
    share: float


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
        ends_at = max(layers) if correct_up_to is None else correct_up_to
        super().__init__(batch, kv, computed, max_rows, ends_at)
        self._span = span
        self._layers = frozenset(layers)
        self._corrects = correct_up_to is not None
        self._heads = heads
        self._asking: dict[tuple[Piece, int | None], list[_Asking]] = {}
        self._last_look = max(layers)
        self._received: torch.Tensor | None = None
        self._on_host: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def get_ready(self, piece: Piece, fresh: Fresh, layer_id: int) -> None:
        if self._corrects:
            self.kv.get_ready(layer_id, piece.rows, fresh.k.dtype, piece.covers, piece.memo)

    def take(self, piece: Piece, fresh: Fresh, layer: LayerKV) -> None:
        if self._corrects:
            self.kv.correct(layer, piece.rows, fresh.k, fresh.v, piece.covers, piece.memo)
        layer.write(piece.rows, fresh.k, fresh.v)

    def leave(self, piece: Piece, layer: LayerKV, fresh: Fresh) -> None:
        if layer.layer_id not in self._layers:
            return
        key = piece, fresh.sliding_window
        if key not in self._asking:
            self._asking[key] = self._who_asks(piece, fresh)
        if asking := self._asking[key]:
            if self._received is None:
                self._received = torch.zeros(self.batch.num_rows, device=fresh.q.device)
            look = partial(self._look, asking, fresh, self._received)
            kind = self._kind(piece, fresh)
            if kind is None:
                look(layer)
            else:
                self.kv.run_alike(("look", kind), layer, _nothing, look)
        if layer.layer_id == self._last_look and piece.last and self._received is not None:
            self._send(self._received)

    def _look(self, asking: list[_Asking], fresh: Fresh, received: torch.Tensor, layer: LayerKV) -> torch.Tensor:
        for queries, keys, mask, share in asking:
            by_head = layer.attention_received(fresh.q[queries], keys, mask, fresh.scoring)
            score = by_head.mean(0) if self._heads == "mean" else by_head.amax(0)
            received[keys].add_(score, alpha=share / len(self._layers))
        return received

    @property
    def received(self) -> torch.Tensor:
        """On the CPU. An accelerator is waited for up to the last layer that counts, not to the end of the forward."""
        if self._on_host is None:
            return torch.zeros(self.batch.num_rows)
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host

    def _send(self, received: torch.Tensor) -> None:
        if received.device.type != "cuda":
            self._on_host = received.cpu()
            return
        self._on_host = torch.empty(received.shape, pin_memory=True)
        self._on_host.copy_(received, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    def _who_asks(self, piece: Piece, fresh: Fresh) -> list[_Asking]:
        asking = []
        for part in piece.parts:
            first = int(torch.searchsorted(piece.rows, part.keys.stop - self._span))
            queries = slice(max(first, part.queries.start), part.queries.stop)
            if queries.start < queries.stop:
                mask = piece.mask(part, queries, fresh.sliding_window, fresh.q.device)
                # Where pieces cut the end of a prompt, each asks for its share.
                share = (queries.stop - queries.start) / self._num_asking(part)
                asking.append(_Asking(queries, part.keys, mask, share))
        return asking

    def _num_asking(self, part: Part) -> int:
        end = part.keys.stop
        return sum(int(((piece.rows >= end - self._span) & (piece.rows < end)).sum()) for piece in self.pieces)


def _nothing(_: LayerKV) -> None:
    """A look changes nothing."""
