"""One layer of a batch in an engine's pages on a GPU: read, written and attended to by kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lmcache.blend.attention import QueryMask, Scoring
from lmcache.blend.dense_runs import DenseAttention, DenseRuns, blocks_in_order, dense_runs, pays, run_tokens
from lmcache.blend.layer_kv import LayerKV
from lmcache.memory.to_device import to_device

if TYPE_CHECKING:
    from lmcache.kernels.kv_rows import KVRows
    from lmcache.kernels.sparse_attention import SeenByAll


_NO_ROWS = torch.empty(0, 0, 0)


class OnDevice:
    """Index tensors of the host, each sent to the device once."""

    def __init__(self, device: torch.device, exact: torch.Tensor) -> None:
        """``exact``: bool ``[N]``, rows that nobody may write."""
        self.device = device
        self._exact = exact
        self._sent: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[tuple[int, ...], tuple[list[torch.Tensor], torch.Tensor]] = {}

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` as int32."""
        return self._once("rows", rows, lambda: rows)

    def writable(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` as int32, −1 in place of exact ones."""
        return self._once("writable", rows, lambda: torch.where(self._exact[rows], -1, rows))

    def places(self, at: torch.Tensor, count: int) -> torch.Tensor:
        """int32 ``[count]``: at ``at[i]`` it is ``i``, −1 elsewhere. The same ``at`` comes with the same ``count``."""
        return self._once("places", at, lambda: torch.full((count,), -1).index_copy_(0, at, torch.arange(len(at))))

    def mask(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """bool ``[N]``, on the host: the rows in any of ``parts``. The same tensor for the same parts."""
        key = tuple(map(id, parts))
        if key not in self._masks:
            mask = torch.zeros_like(self._exact)
            for rows in parts:
                mask[rows] = True
            self._masks[key] = list(parts), mask
        return self._masks[key][1]

    def _once(self, kind: str, of: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        held = self._sent.get((kind, id(of)))
        if held is None:
            # The host's is kept, so that no other can have its id.
            held = self._sent[kind, id(of)] = of, to_device(make().to(torch.int32), self.device)
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
        self._blocks: dict[tuple[int, int], torch.Tensor | None] = {}
        self._made: dict[int, tuple[QueryMask, DenseRuns | None]] = {}

    def runs(self, keys: slice, mask: QueryMask, scoring: Scoring, group: int) -> DenseRuns | None:
        """``group``: query heads of a KV head."""
        if self.dense is None or scoring.softcap is not None or scoring.sinks is not None:
            return None
        if mask.sliding_window is not None or mask.known is not None:
            return None
        held = self._made.get(id(mask))
        if held is None:  # the mask is kept, so that no other can have its id
            held = self._made[id(mask)] = mask, self._make(keys, mask.positions_on_host, group)
        return held[1]

    def _make(self, keys: slice, positions: torch.Tensor, group: int) -> DenseRuns | None:
        if not pays(len(positions), keys.stop - keys.start):
            return None
        prompt = keys.start, keys.stop
        if prompt not in self._blocks:
            blocks = blocks_in_order(self._slots[keys], self._block_size)
            self._blocks[prompt] = None if blocks is None else to_device(blocks, self._device)
        on_device = self._blocks[prompt]
        if on_device is None:
            return None
        return dense_runs(positions, on_device, self._device, run_tokens(group))


class PagedLayer(LayerKV):
    """One layer of the batch in its pages. It has no ``keys`` and ``values`` of its own."""

    def __init__(self, layer_id: int, kv: KVRows, sent: OnDevice, pages: PromptPages) -> None:
        super().__init__(layer_id, _NO_ROWS, _NO_ROWS)
        self.kv = kv
        self._sent = sent
        self._pages = pages
        self._written: list[torch.Tensor] = []
        self.change = {}
        self._changes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.used_engines_attention = False

    def at(self, kv: KVRows, corrected_to: int) -> PagedLayer:
        """The same layer before anything was written to it, seen through other ``kv``."""
        layer = PagedLayer(self.layer_id, kv, self._sent, self._pages)
        layer.corrected_to = corrected_to
        return layer

    def take_over(self, other: PagedLayer) -> None:
        """What was done to ``other`` by the same rows was done to this one too."""
        self.corrected_to = other.corrected_to
        self._written += other._written

    @property
    def fresh(self) -> torch.Tensor:
        """The same tensor in all layers with the same fresh rows; not to be changed."""
        return self._sent.mask(self._written)

    def measure(self, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        from lmcache.kernels.kv_read import deviation

        first = ~self.fresh[rows] if self._written else None
        if first is not None and not bool(first.all()):
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

        write(dense_heads(k), dense_heads(v), self._sent.writable(rows), self.kv)
        self._written.append(rows)

    def held(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read(self._sent.rows(rows))

    def held_among(
        self, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from lmcache.kernels.kv_read import read_among

        places = self._sent.places(at, len(rows))
        return read_among(self.kv, self._sent.rows(rows), dense_heads(k), dense_heads(v), places)

    def attention(
        self, q: torch.Tensor, keys: slice, mask: QueryMask, scoring: Scoring, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        from lmcache.kernels.sparse_attention import sparse_attention

        q = dense_heads(q)
        attended, _ = sparse_attention(
            q,
            self.kv.part(keys),
            mask.positions_int32,
            sliding_window=mask.sliding_window,
            known=mask.known,
            seen_by_all=self._seen_by_all(q, keys, mask, scoring),
            positions_on_host=mask.positions_on_host,
            out=out if out is not None and self._can_fill(out, q) else None,
            **scoring._asdict(),
        )
        return attended

    def _can_fill(self, out: torch.Tensor, q: torch.Tensor) -> bool:
        return out.is_contiguous() and out.dtype == q.dtype and out.shape == (*q.shape[:2], self.kv.value_dim)

    def _seen_by_all(self, q: torch.Tensor, keys: slice, mask: QueryMask, scoring: Scoring) -> SeenByAll | None:
        """The part that the engine's own attention computes, if it can."""
        from lmcache.kernels.sparse_attention import SeenByAll

        runs = self._pages.runs(keys, mask, scoring, q.shape[1] // self.kv.num_heads)
        if runs is None:
            return None
        assert self._pages.dense is not None
        self.used_engines_attention = True
        out, lse = self._pages.dense(q, self.kv.keys, self.kv.values, runs, scoring.scale)
        return SeenByAll(runs.tokens, runs.keys, out, lse)

    def attention_received(self, q: torch.Tensor, keys: slice, mask: QueryMask, scoring: Scoring) -> torch.Tensor:
        from lmcache.kernels.attention_received import attention_received

        return attention_received(
            dense_heads(q),
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


def dense_heads(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where the elements of a head lie one after the other."""
    return x if x.stride(-1) == 1 else x.contiguous()
