"""Attention of scattered queries over the whole KV of a prompt, and the attention that each key receives.

A query at position p sees key j exactly when ``j <= p`` (and ``j > p - window``). The usual bottom-right causal mask
would show scattered rows keys of their future.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lmcache.blend.cpu_linear import as_weights, linear

# Rows a tile: keys beyond a tile's last query are not read, so smaller tiles waste less; at 64 the matrix products are
# still as fast as at 256 (measured on one CPU core).
_TILE = 64
# Masks are kept for the layers to come up to this many elements, and made again for every layer beyond it.
_MAX_KEPT_MASK = 2**25


@dataclass(frozen=True)
class QueryTile:
    """Query rows ``[start, end)`` and the keys ``[key_start, key_end)`` that any of them sees."""

    start: int
    end: int
    key_start: int
    key_end: int


class Scoring(NamedTuple):
    """How a layer turns q·k into weights; see :class:`lmcache.blend.host.Attend`."""

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class QueryMask:
    """Which keys of a prompt its queries see, cut into tiles.

    Args:
        positions: int64 ``[n]``, ascending: where the queries stand.
        sliding_window: as in :class:`lmcache.blend.host.Attend`.
        known: bool ``[num_keys]``: keys that may be seen at all; None: every one.
        on_host: the same positions on the CPU; None: they are brought from the device if they are wanted.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        sliding_window: int | None = None,
        known: torch.Tensor | None = None,
        on_host: torch.Tensor | None = None,
    ) -> None:
        self.positions = positions
        self._on_host = on_host
        self.sliding_window = sliding_window
        self.known = known
        self._kept: dict[QueryTile, torch.Tensor] = {}

    @cached_property
    def positions_on_host(self) -> torch.Tensor:
        return self.positions.cpu() if self._on_host is None else self._on_host

    @cached_property
    def _at(self) -> list[int]:
        at: list[int] = self.positions_on_host.tolist()
        return at

    @cached_property
    def tiles(self) -> list[QueryTile]:
        at, tiles = self._at, []
        for start in range(0, len(at), _TILE):
            end = min(start + _TILE, len(at))
            first = 0 if self.sliding_window is None else max(0, at[start] - self.sliding_window + 1)
            tiles.append(QueryTile(start, end, first, at[end - 1] + 1))
        return tiles

    @cached_property
    def _keep(self) -> bool:
        elements = sum((tile.end - tile.start) * (tile.key_end - tile.key_start) for tile in self.tiles)
        return elements <= _MAX_KEPT_MASK

    @cached_property
    def positions_int32(self) -> torch.Tensor:
        return self.positions.to(torch.int32)

    def partly_hidden(self, tile: QueryTile) -> slice:
        """Keys of a tile, counted from its first, beyond which on either side every query sees every key."""
        if self.sliding_window is not None or self.known is not None:
            return slice(0, tile.key_end - tile.key_start)
        return slice(self._at[tile.start] + 1 - tile.key_start, tile.key_end - tile.key_start)

    def bias(self, tile: QueryTile, dtype: torch.dtype) -> torch.Tensor:
        """``[queries, keys]`` of a tile: 0 where seen, −inf where not."""
        bias = self._kept.get(tile)
        if bias is None:
            queries = self.positions[tile.start : tile.end, None]
            keys = torch.arange(tile.key_start, tile.key_end, device=queries.device)
            hidden = keys > queries
            if self.sliding_window is not None:
                hidden |= keys <= queries - self.sliding_window
            if self.known is not None:
                hidden |= ~self.known[tile.key_start : tile.key_end]
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
            if self._keep:
                self._kept[tile] = bias
        return bias


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: QueryMask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of ``q`` ``[n, query_heads, dim]`` over ``k`` ``[num_keys, kv_heads, dim]`` and ``v``.

    ``query_heads`` is a multiple of ``kv_heads`` (grouped queries). ``softcap`` and ``sinks`` as in
    :class:`lmcache.blend.host.Attend`.

    Returns:
        ``[n, query_heads, value_dim]`` in the dtype of ``q``.
    """
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    if q.device.type == "cpu":
        return _on_cpu(q, k, v, mask, out, scale, softcap, sinks)
    for tile in mask.tiles:
        rows, keys = slice(tile.start, tile.end), slice(tile.key_start, tile.key_end)
        if softcap is None and sinks is None:
            heads_first = F.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None],
                k[keys].transpose(0, 1)[None],
                v[keys].transpose(0, 1)[None],
                attn_mask=mask.bias(tile, q.dtype),
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )[0]
        else:
            weights = _weights(q[rows], k[keys], mask.bias(tile, torch.float32), scale, softcap, sinks)
            grouped = _by_kv_head(weights.to(v.dtype), v.shape[1])
            heads_first = (grouped @ v[keys].transpose(0, 1)[:, None]).flatten(0, 1)
        out[rows] = heads_first.transpose(0, 1)
    return out


def _on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: QueryMask,
    out: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One matrix product for all queries of a KV head: on a CPU twice as fast as torch's own attention with a mask.

    Scores are float32 also for 16-bit types; the weights are rounded to that of ``v``, as in flash attention.
    """
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(dtype) * scale
    keys, values = as_weights(k.to(dtype).transpose(0, 1)), as_weights(v.permute(1, 2, 0))
    room = queries.new_empty(group * _TILE * len(k))
    for tile in mask.tiles:
        rows, span = slice(tile.start, tile.end), slice(tile.key_start, tile.key_end)
        hidden = mask.partly_hidden(tile)
        bias = mask.bias(tile, dtype)[:, hidden]
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            asking = queries[rows, heads].transpose(0, 1).flatten(0, 1)
            shape = (len(asking), tile.key_end - tile.key_start)
            scores = linear(asking, keys[head, span], room[: math.prod(shape)].view(shape))
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            by_query = scores.view(group, tile.end - tile.start, -1)
            by_query[:, :, hidden] += bias
            if sinks is None:
                torch.softmax(scores, -1, out=scores)
            else:
                _softmax_with_sink(by_query, sinks[heads])
            attended = linear(scores.to(v.dtype), values[head, :, span])
            out[rows, heads] = attended.view(group, tile.end - tile.start, -1).transpose(0, 1)
    return out


def _softmax_with_sink(scores: torch.Tensor, sinks: torch.Tensor) -> None:
    """In place over the last dim of ``[heads, queries, keys]``; each head's sink takes its share and has no value."""
    sink = sinks.to(scores.dtype)[:, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), sink)
    torch.exp(scores.sub_(top), out=scores)
    scores.div_(scores.sum(-1, keepdim=True) + torch.exp(sink - top))


def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: QueryMask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each key gets, averaged over the queries: float32 ``[query_heads, num_keys]``.

    Arguments as in :func:`sparse_attention`.
    """
    received = torch.zeros(q.shape[1], len(k), dtype=torch.float32, device=k.device)
    for tile in mask.tiles:
        keys = slice(tile.key_start, tile.key_end)
        weights = _weights(q[tile.start : tile.end], k[keys], mask.bias(tile, torch.float32), scale, softcap, sinks)
        received[:, keys] += weights.sum(1)
    return received / len(q)


def _weights(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax weights, float32 ``[query_heads, queries, keys]``."""
    grouped = _by_kv_head(q.transpose(0, 1), k.shape[1])
    if q.device.type == "cpu":
        by_head = [linear(asking.flatten(0, 1), k[:, head]) for head, asking in enumerate(grouped)]
        scores = torch.cat(by_head).view(q.shape[1], len(q), len(k)).float() * scale
    else:
        scores = (grouped @ k.permute(1, 2, 0)[:, None]).flatten(0, 1).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores += bias
    if sinks is None:
        return scores.softmax(-1)
    with_sink = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    return with_sink.softmax(-1)[..., :-1]


def _by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[query_heads, …]`` as ``[kv_heads, group, …]``."""
    return x.reshape(kv_heads, -1, *x.shape[1:])
