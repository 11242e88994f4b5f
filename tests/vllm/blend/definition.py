"""What a blend is to compute, word for word: every token runs, and reused K and V take the place of computed ones.

Nothing of the library's attention, ropes or masks is used: keys are turned by vLLM's own rotary modules, and weights
are a dense softmax in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Reused:
    """``keys`` and ``values`` ``[layers][n, kv_heads, dim]`` of tokens from ``start`` on, ``moved_by`` positions."""

    start: int
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    moved_by: int


class Definition:
    """An ``attend``. ``kept`` (bool ``[n]``) marks the rows that are not recomputed from layer ``first_layer`` on.

    ``rotary``: one a layer, a rotary module of vLLM, or None where keys are not rotated.
    """

    def __init__(self, reused: list[Reused], kept: torch.Tensor, rotary: list[Any], first_layer: int) -> None:
        self._reused = reused
        self._kept = kept
        self._rotary = rotary
        self._first_layer = first_layer

    def __call__(
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
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        k, v = k.clone(), v.clone()
        for passage in self._reused if layer_id >= self._first_layer else []:
            at = torch.arange(len(passage.keys[layer_id])) + passage.start
            taken = self._kept[at]
            moved = turned(passage.keys[layer_id], passage.moved_by, self._rotary[layer_id])
            k[at[taken]] = moved[taken]
            v[at[taken]] = passage.values[layer_id][taken]
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        row = torch.arange(len(q))
        hidden = row > row[:, None]
        if sliding_window is not None:
            hidden |= row <= row[:, None] - sliding_window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=-1)
        weights = scores.softmax(-1)[..., : len(q)]
        return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def turned(keys: torch.Tensor, moved_by: int, rotary: Any) -> torch.Tensor:
    """Rotations add up: keys that are rotated already, rotated once more by the distance."""
    if rotary is None:
        return keys
    positions = torch.full((len(keys),), moved_by)
    flat, _ = rotary.forward_native(positions, keys.flatten(1), None)
    # Some scaled RoPEs scale too, and that has been done.
    return flat.view_as(keys) / rotary.cos_sin_cache[0, 0]
