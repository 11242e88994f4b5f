"""The KV of a batch while it is blended: moved into place once a layer, then overwritten with what is computed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property

import torch

from lmcache.blend.attention import QueryMask, Scoring, attention_received, sparse_attention
from lmcache.blend.batch import BlendBatch, PlacedSpan
from lmcache.blend.correctors.interface import Corrector, LayerCorrection, Memo
from lmcache.blend.kv_source import KVLoadError
from lmcache.blend.layer_room import LayerRoom
from lmcache.blend.rope import FusedRope
from lmcache.observability.ranges import Range


class PromptLoadError(Exception):
    """A passage of one prompt of the batch cannot be loaded."""

    def __init__(self, prompt: int, reason: str) -> None:
        super().__init__(reason)
        self.prompt = prompt


class LayerKV:
    """K and V of one layer for every row of the batch, ``[N, kv_heads, dim]``.

    ``fresh`` (bool ``[N]``) marks the rows that were computed at this layer. Rows that are neither fresh nor reused are
    zero and mean nothing: a forward that leaves them out must not look at them.
    """

    def __init__(self, layer_id: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.layer_id = layer_id
        self.keys = keys
        self.values = values
        self._num_rows = len(keys)
        self.corrected_to = 0

    @cached_property
    def _fresh(self) -> torch.Tensor:
        return torch.zeros(self._num_rows, dtype=torch.bool)

    @cached_property
    def change(self) -> dict[str, torch.Tensor]:
        return {"k": torch.zeros(self._num_rows), "v": torch.zeros(self._num_rows)}

    @property
    def fresh(self) -> torch.Tensor:
        return self._fresh

    def measure(self, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Note how far the fresh ``k``, ``v`` of ``rows`` are from what they will overwrite: in ``change``, the sum of
        squares over heads and dims, float32 ``[N]``. A row that is fresh already keeps what was noted then."""
        first = ~self.fresh[rows]
        at, taken = rows[first].to(k.device), first.to(k.device)
        for name, fresh, moved in (("k", k, self.keys), ("v", v, self.values)):
            change = (fresh[taken].float() - moved[at].float()).square().flatten(1).sum(1)
            self.change[name][rows[first]] = change.cpu()

    def read_change(self) -> None:
        """Have what was measured in ``change``: it is."""

    def write(self, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Fresh ``k``, ``v`` of ``rows`` take the place of what was there."""
        at = rows.to(self.keys.device)
        self.keys.index_copy_(0, at, k)
        self.values.index_copy_(0, at, v)
        self._fresh[rows] = True

    def held(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of K and V of ``rows`` (int64 ``[n]``, on the CPU), ``[n, kv_heads, dim]`` each."""
        at = rows.to(self.keys.device)
        return self.keys.index_select(0, at), self.values.index_select(0, at)

    def held_among(
        self, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`held` of ``rows``, in the dtype of ``k``, but ``rows[at[i]]`` are as in row ``i`` of ``k`` and ``v``.

        The same tensors ``rows`` and ``at`` mean the same rows in all layers."""
        on_device = at.to(k.device)
        keys, values = (held.to(k.dtype) for held in self.held(rows))
        return keys.index_copy_(0, on_device, k), values.index_copy_(0, on_device, v)

    def attention(
        self, q: torch.Tensor, keys: slice, mask: QueryMask, scoring: Scoring, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of ``q`` over the rows ``keys``, those of one prompt: :func:`lmcache.blend.attention.sparse_attention`. In
        ``out``, where that can be used."""
        return sparse_attention(q, self.keys[keys], self.values[keys], mask, **scoring._asdict())

    def attention_received(self, q: torch.Tensor, keys: slice, mask: QueryMask, scoring: Scoring) -> torch.Tensor:
        """:func:`lmcache.blend.attention.attention_received` of the rows ``keys``."""
        return attention_received(q, self.keys[keys], mask, **scoring._asdict())


class BatchKV:
    """All layers of a batch. Layers are loaded and re-rotated when they are first wanted."""

    def __init__(
        self, batch: BlendBatch, ropes: Sequence[FusedRope | None], corrector: Corrector, room: LayerRoom | None = None
    ) -> None:
        """``room``: cleared, and used by nobody else; None: one of its own."""
        self.batch = batch
        self.ropes = ropes
        self.corrector = corrector
        self._layers: dict[int, LayerKV] = {}
        self._room = room or LayerRoom()
        self.seconds = {"load": 0.0, "correct": 0.0}

    @cached_property
    def _holes(self) -> torch.Tensor:
        return torch.nonzero(~(self.batch.reusable | self.batch.exact))[:, 0]

    def layer(self, layer_id: int, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        """The layer, its reused rows in place. ``k`` and ``v`` are fresh ones, for shape, dtype and device.

        Raises:
            PromptLoadError: a source failed.
        """
        held = self._layers.get(layer_id)
        if held is None:
            start = time.perf_counter()
            with Range("load layer"):
                held = self._layers[layer_id] = self.load(layer_id, k, v)
            self.seconds["load"] += time.perf_counter() - start
        return held

    def load(self, layer_id: int, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        """The layer as it comes from its sources, moved."""
        num_rows = self.batch.num_rows
        held = LayerKV(layer_id, self._room.take(num_rows, k), self._room.take(num_rows, v))
        # What is masked out has weight 0, and 0 times what happens to lie in fresh memory may be NaN.
        held.values.index_fill_(0, self._holes.to(v.device), 0)
        held.keys.index_fill_(0, self._holes.to(k.device), 0)
        for placed in self.batch.placed:
            self._place(held, placed)
        self._prefetch(layer_id + 1)
        return held

    def _prefetch(self, layer_id: int) -> None:
        """Let sources bring the next layer while this one is used."""
        if layer_id < len(self.ropes):
            for placed in self.batch.placed:
                prefetch = getattr(placed.source, "prefetch", None)
                if prefetch is not None:
                    prefetch(layer_id)

    def _place(self, layer: LayerKV, placed: PlacedSpan) -> None:
        self._copy(layer, placed)
        span, (start, end) = placed.span, placed.rows
        rope = self.ropes[layer.layer_id]
        if rope is not None and not span.exact:
            new = self.batch.positions[start:end]
            rope.fused_encode(
                new + (span.old_start - span.start),
                new,
                layer.keys[start:end],
                old_length=placed.source.length,
                new_length=self.batch.plans[placed.prompt].num_tokens,
            )

    def _copy(self, layer: LayerKV, placed: PlacedSpan) -> None:
        span, (start, end) = placed.span, placed.rows
        copy_into = getattr(placed.source, "copy_into", None)
        if copy_into is not None and copy_into(
            layer.layer_id, span.source_start, layer.keys[start:end], layer.values[start:end]
        ):
            return
        try:
            keys, values = placed.source.layer(layer.layer_id)
        except KVLoadError as error:
            raise PromptLoadError(placed.prompt, str(error)) from error
        taken = slice(span.source_start, span.source_start + end - start)
        for name, theirs, ours in (("K", keys, layer.keys), ("V", values, layer.values)):
            if theirs.shape[1:] != ours.shape[1:] or len(theirs) < taken.stop:
                raise PromptLoadError(
                    placed.prompt,
                    f"{name} of layer {layer.layer_id} is {list(theirs.shape)} in its source, the model's is "
                    f"{list(ours.shape[1:])} a token, and {taken.stop} tokens are wanted",
                )
            ours[start:end] = theirs[taken]

    def run_alike(
        self,
        kind: Hashable,
        layer: LayerKV,
        take: Callable[[LayerKV], None],
        attention: Callable[[LayerKV], torch.Tensor],
    ) -> torch.Tensor:
        """``take(layer)``, then what ``attention(layer)`` gives: on an accelerator the same work for all layers of one
        ``kind``. The next call may overwrite the outcome."""
        take(layer)
        return attention(layer)

    def correct(
        self,
        layer: LayerKV,
        rows: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        covers: tuple[int, int],
        memo: Memo,
    ) -> None:
        """Let the corrector move what is not recomputed of the batch's rows ``covers``. Each row once a layer, until
        :meth:`correct_again`: by then it has its final content, unless it is computed again.

        A passage that reaches over the ends of ``covers`` counts as one there and another here. ``memo`` is that of
        ``rows``.
        """
        spans = self.spans_to_correct(layer.corrected_to, rows, covers, memo)
        layer.corrected_to = max(layer.corrected_to, covers[1])
        if not spans:
            return
        start = time.perf_counter()
        with Range("correct"):
            self.correct_spans(layer, rows, k, v, spans, memo)
        self.seconds["correct"] += time.perf_counter() - start

    def correct_again(self) -> None:
        """What was corrected is to be corrected once more, by rows that are computed from now on."""
        for layer in self._layers.values():
            layer.corrected_to = 0

    def get_ready(
        self, layer_id: int, rows: torch.Tensor, dtype: torch.dtype, covers: tuple[int, int], memo: Memo
    ) -> None:
        """:meth:`layer` and :meth:`correct` come next, with K and V of ``rows`` in ``dtype``: do what does not hang on
        them."""

    def spans_to_correct(
        self, corrected_to: int, rows: torch.Tensor, covers: tuple[int, int], memo: Memo
    ) -> tuple[tuple[int, int], ...]:
        """Those of the batch's rows ``covers`` that were not corrected yet, if those up to ``corrected_to`` were."""
        first, end = max(covers[0], corrected_to), covers[1]
        spans: tuple[tuple[int, int], ...] | None = memo.get(("spans", first, end))
        if spans is None:
            spans = memo["spans", first, end] = self._spans_to_correct(rows, first, end)
        return spans

    def _spans_to_correct(self, rows: torch.Tensor, first: int, end: int) -> tuple[tuple[int, int], ...]:
        """The moved spans within rows ``[first, end)``; none where ``rows`` are all that is reusable there."""
        if first >= end:
            return ()
        kept = self.batch.reusable[first:end].clone()
        kept[rows[(rows >= first) & (rows < end)] - first] = False
        if not bool(kept.any()):
            return ()
        spans = ((max(begin, first), min(stop, end)) for begin, stop in self.batch.moved_spans)
        return tuple((begin, stop) for begin, stop in spans if begin < stop)

    def correct_spans(
        self,
        layer: LayerKV,
        rows: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: tuple[tuple[int, int], ...],
        memo: Memo,
    ) -> None:
        device = layer.keys.device
        self.corrector.correct(
            LayerCorrection(
                layer_id=layer.layer_id,
                keys=layer.keys,
                values=layer.values,
                rows=rows.to(device),
                fresh_keys=k,
                fresh_values=v,
                spans=spans,
                positions=self.batch.positions.to(device),
                rope=self.ropes[layer.layer_id],
                memo=memo,
            )
        )

    def let_go(self, layer: LayerKV) -> None:
        """Its content is kept elsewhere now; what was counted stays."""
        for tensor in (layer.keys, layer.values):
            self._room.give_back(tensor)
        layer.keys = layer.keys[:0]
        layer.values = layer.values[:0]

    def tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """K and V of every layer that was not let go, in order."""
        layers = [self._layers[index] for index in sorted(self._layers) if len(self._layers[index].keys)]
        return [layer.keys for layer in layers], [layer.values for layer in layers]

    def charged_budgets(self, num_layers: int) -> tuple[float, ...]:
        """One a prompt: the share of (reused token, layer) pairs whose QKV was computed afresh."""
        masks = [layer.fresh for layer in self._layers.values()]  # many layers share one
        distinct = {id(mask): mask for mask in masks}
        layers_of = Counter(map(id, masks))
        charged = []
        for start, end in self.batch.prompts:
            reusable = self.batch.reusable[start:end]
            computed = sum(
                layers * int((distinct[mask][start:end] & reusable).sum()) for mask, layers in layers_of.items()
            )
            charged.append(computed / max(1, num_layers * int(reusable.sum())))
        return tuple(charged)
