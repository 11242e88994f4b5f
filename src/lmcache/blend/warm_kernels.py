"""Compiles the kernels of a blend before a request waits for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lmcache.blend.batch import BlendBatch, BlendPrompt
from lmcache.blend.blend_pass import blend
from lmcache.blend.correctors.interface import Corrector
from lmcache.blend.correctors.none import NoneCorrector
from lmcache.blend.fp8_pages import Fp8Pages
from lmcache.blend.host import Attend
from lmcache.blend.paged_batch import PagedBatchKV
from lmcache.blend.paged_layer import PagedLayer
from lmcache.blend.plan import BlendPlan, ReusedSpan
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.rope import FusedRope
from lmcache.blend.staged_layers import StagingRing
from lmcache.observability.logging import init_logger
from lmcache.paging.paged_connector import PagedConnector

logger = init_logger(__name__)

_PASSAGE = 2048
_NEW = (8, 100)


@dataclass(frozen=True)
class AttentionKind:
    """What a layer passes to :class:`lmcache.blend.host.Attend`."""

    query_heads: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def warm_kernels(
    connector: PagedConnector,
    ropes: Sequence[FusedRope | None],
    layers: Sequence[AttentionKind],
    ring: StagingRing,
    ways: Sequence[tuple[SelectionPolicy, Corrector]],
    fp8: Fp8Pages | None = None,
) -> None:
    """Run small blends of noise, without a model. The pages must be nobody's: the first of them are overwritten."""
    from lmcache.kernels.next_layer import compile_for

    start = time.perf_counter()
    compile_for(ring.device)
    layout = connector.kv_layout
    computed, stored = (layout.dtype, layout.dtype) if fp8 is None else (fp8.computed, fp8.dtype)
    host = _Noise(layers, (layout.num_heads, layout.head_dim), computed, ring.device)
    for count in _NEW:
        num_tokens = min(_PASSAGE + 2 * count, layout.num_slots)
        new_tokens = min(count, num_tokens // 4)
        end = num_tokens - new_tokens
        plan = BlendPlan.of(num_tokens, [ReusedSpan(new_tokens, end, 0, old_start=new_tokens + 1)])
        for policy, corrector in ways:
            blend(
                host,
                [BlendPrompt(plan, [_NoisySource(host, end - new_tokens, stored, layout.dtype)], ratio=0.2)],
                ropes,
                policy,
                corrector,
                kv_only=True,
                make_kv=partial(
                    PagedBatchKV,
                    connector=connector,
                    slots=torch.arange(num_tokens),
                    exact=torch.zeros(num_tokens, dtype=torch.bool),
                    ring=ring,
                    fp8=fp8,
                ),
            )
    _attend_in_every_way(connector, layers, host, ring, fp8)
    logger.info("The kernels of CacheBlend are ready, after %.1f s", time.perf_counter() - start)


def _attend_in_every_way(
    connector: PagedConnector,
    layers: Sequence[AttentionKind],
    host: _Noise,
    ring: StagingRing,
    fp8: Fp8Pages | None,
) -> None:
    """Few queries, with the keys in parts and in one, and so many that they take another tile: which of these a blend
    takes hangs on its prompt."""
    from lmcache.kernels.attention_tiles import padded_dim, tiles
    from lmcache.kernels.sparse_attention import sparse_attention

    num_tokens = min(_PASSAGE, connector.kv_layout.num_slots)
    batch = BlendBatch([BlendPrompt(BlendPlan(num_tokens), ())])
    slots, exact = torch.arange(num_tokens), torch.zeros(num_tokens, dtype=torch.bool)
    ropes, nothing = [None] * len(layers), torch.empty(0)
    kv = PagedBatchKV(batch, ropes, NoneCorrector(), connector, slots, exact, ring, fp8=fp8)
    layer = kv.load(0, nothing, nothing)
    assert isinstance(layer, PagedLayer)
    rows = layer.kernel_rows
    positions = torch.arange(_NEW[0], dtype=torch.int32, device=ring.device)
    variants = {
        (kind.query_heads, kind.sliding_window is None, kind.softcap is None, kind.sinks is None): kind
        for kind in layers
    }
    for kind in variants.values():
        q = host.noise(len(positions), kind.query_heads)
        few, *many = tiles(padded_dim(rows.dim, rows.value_dim), q.dtype)
        for tile, part_keys in ((few, few[1]), (few, num_tokens), *((tile, num_tokens) for tile in many)):
            sparse_attention(
                *(q, rows, positions),
                scale=kind.scale,
                sliding_window=kind.sliding_window,
                softcap=kind.softcap,
                sinks=kind.sinks,
                blocks=tile,
                part_keys=part_keys,
            )


class _Noise:
    """A host without a model."""

    def __init__(
        self, layers: Sequence[AttentionKind], kv_shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers = layers
        self._kv_shape = kv_shape
        self._dtype = dtype
        self._device = device

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, attend: Attend) -> None:
        for number, layer in enumerate(self._layers):
            q = self.noise(len(rows), layer.query_heads)
            k, v = self.noise(len(rows)), self.noise(len(rows))
            attend(
                *(number, q, k, v),
                scale=layer.scale,
                sliding_window=layer.sliding_window,
                softcap=layer.softcap,
                sinks=layer.sinks,
            )

    def noise(self, num_rows: int, heads: int | None = None) -> torch.Tensor:
        kv_heads, dim = self._kv_shape
        return torch.randn(num_rows, heads or kv_heads, dim, device=self._device).to(self._dtype)


class _NoisySource:
    """Its numbers are ``stored``, its tensors said to be ``kept``."""

    def __init__(self, host: _Noise, num_tokens: int, stored: torch.dtype, kept: torch.dtype) -> None:
        self._host = host
        self._stored = stored
        self._kept = kept
        self.num_tokens = self.length = num_tokens

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._noise(), self._noise()

    def _noise(self) -> torch.Tensor:
        return self._host.noise(self.num_tokens).to(self._stored).view(self._kept)
