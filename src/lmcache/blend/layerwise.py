"""A blend whose model somebody else runs: what happens between the projections and the attention of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lmcache.blend.batch import BlendBatch, BlendPrompt
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.layer_kv import BatchKV
from lmcache.blend.rope import FusedRope
from lmcache.blend.selection import SelectionContext
from lmcache.blend.top_rows import top_rows
from lmcache.config import LMCacheEngineConfig


class LayerwiseBlend:
    """One prompt. Every token that is not an exact prefix starts; check layers narrow them down (``kv_deviation``).

    ``rows`` (int64, ascending) are the positions of the tokens that are computed from the next layer on.
    """

    def __init__(
        self,
        prompt: BlendPrompt,
        ropes: Sequence[FusedRope | None],
        corrector: Corrector,
        config: LMCacheEngineConfig,
        on_layer: Callable[[int, torch.Tensor, torch.Tensor], None],
    ) -> None:
        """``on_layer`` is given each layer's number, keys and values ``[N, kv_heads, dim]`` before its attention.

        Raises:
            ValueError: the configuration asks for thresholds.
        """
        if config.blend_thresholds is not None:
            raise ValueError(
                f"blend_thresholds={list(config.blend_thresholds)}: layer by layer the tokens are chosen by "
                "blend_recompute_ratios; leave the thresholds unset, or call blend"
            )
        self._batch = BlendBatch([prompt])
        self._kv = BatchKV(self._batch, ropes, corrector)
        self._ratios = dict(zip(config.blend_check_layers, config.blend_recompute_ratios, strict=True))
        self._on_layer = on_layer
        self.rows = torch.nonzero(~self._batch.exact)[:, 0]
        self.next_layer = 0

    def process_qkv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        residual: torch.Tensor | None,
        layer_id: int,
        attn_output: torch.Tensor | None,
        attn_metadata: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, Any]:
        """See :meth:`lmcache.blend.lmc_blender.LMCBlender.process_qkv`."""
        if layer_id != self.next_layer:
            raise ValueError(f"layer {layer_id}: layers come in order, each once, and layer {self.next_layer} is next")
        if len(q) != len(self.rows):
            raise ValueError(f"layer {layer_id}: {len(self.rows)} tokens are computed by now, q has {len(q)}")
        shape = k.shape[1:]
        k, v = self._by_head(k), self._by_head(v)
        layer = self._kv.layer(layer_id, k, v)
        rows = self.rows
        if layer_id in self._ratios:
            layer.measure(rows, k, v)
            kept = self._narrowed(layer.change["v"], self._ratios[layer_id]).to(q.device)
            q = q[kept]
            residual, attn_output = (None if x is None else x[kept] for x in (residual, attn_output))
            self.rows = rows[kept.cpu()]
            if hasattr(attn_metadata, "positions"):
                attn_metadata.positions = self.rows.to(q.device)
        # What was computed for the others to get here is fresh, and stays.
        self._kv.correct(layer, rows, k, v, (0, self._batch.num_rows), {})
        layer.write(rows, k, v)
        self.next_layer += 1
        self._on_layer(layer_id, layer.keys, layer.values)
        full = (plane.reshape(len(plane), *shape) for plane in (layer.keys, layer.values))
        return q, *full, residual, attn_output, attn_metadata

    def _narrowed(self, change: torch.Tensor, ratio: float) -> torch.Tensor:
        """Which of ``rows`` go on: those that must, and those that change most."""
        reusable = self._batch.reusable & ~self._batch.forced
        total = int(self._batch.reusable.sum())
        count = max(1, SelectionContext.budget(total, ratio))
        among = torch.zeros_like(reusable)
        among[self.rows] = True
        chosen = self._batch.forced.clone()
        chosen[top_rows(change, count, among & reusable)] = True
        return torch.nonzero(chosen[self.rows])[:, 0]

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, kv_heads · dim]`` as ``[n, kv_heads, dim]``."""
        if x.dim() == 3:
            return x
        head_size = next((rope.head_size for rope in self._kv.ropes if rope is not None), None)
        if head_size is None:
            raise ValueError("k and v must be [n, kv_heads, dim]: the model's ropes do not tell the size of a head")
        return x.view(len(x), -1, head_size)
