"""A small random transformer: a blend host, and the slow, obvious blend to check against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmcache.blend.host import Attend
from lmcache.blend.kv_source import KVLoadError

LAYERS, QUERY_HEADS, KV_HEADS, DIM, HIDDEN, VOCAB = 4, 4, 2, 16, 32, 50
SCALE = DIM**-0.5
_FREQUENCIES = 1.0 / (10_000.0 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``x`` ``[n, heads, DIM]`` rotated to ``positions``."""
    angles = positions[:, None].double() * _FREQUENCIES.to(positions.device)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass(frozen=True)
class LayerKVPair:
    k: torch.Tensor
    v: torch.Tensor


class TinyModel:
    """Pre-norm decoder with grouped queries and RoPE, float64."""

    num_layers = LAYERS

    def __init__(self, seed: int = 0, device: str = "cpu") -> None:
        self.device = device
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) / shape[0] ** 0.5

        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(device)
        self.layers = [
            {
                "q": weight(HIDDEN, QUERY_HEADS * DIM) * 2,
                "k": weight(HIDDEN, KV_HEADS * DIM) * 2,
                "v": weight(HIDDEN, KV_HEADS * DIM),
                "o": weight(QUERY_HEADS * DIM, HIDDEN),
                "up": weight(HIDDEN, 2 * HIDDEN),
                "down": weight(2 * HIDDEN, HIDDEN),
            }
            for _ in range(LAYERS)
        ]

    def run(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        ids, positions = ids.to(self.device), positions.to(self.device)
        hidden = self.embedding[ids]
        for index, w in enumerate(self.layers):
            x = _norm(hidden)
            q, k, v = (
                (x @ w[name]).view(len(ids), heads, DIM)
                for name, heads in (("q", QUERY_HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
            )
            out = attend(index, rotate(q, positions), rotate(k, positions), v, scale=SCALE)
            hidden = hidden + out.reshape(len(ids), -1) @ w["o"]
            hidden = hidden + torch.relu(_norm(hidden) @ w["up"]) @ w["down"]
        return _norm(hidden) @ self.embedding.T

    def prefill(self, ids: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, list[LayerKVPair]]:
        """Logits of the last token, and K and V of every layer, of ``ids`` alone at positions ``start …``."""
        return self.blend(ids, torch.ones(len(ids), dtype=torch.bool), None, start)

    def blend(
        self, ids: torch.Tensor, computed: torch.Tensor, moved: Sequence[LayerKVPair] | None, start: int = 0
    ) -> tuple[torch.Tensor, list[LayerKVPair]]:
        """The definition, spelled out: ``computed`` rows go through the model, the others' KV is ``moved``."""
        rows = torch.nonzero(computed)[:, 0]
        positions = torch.arange(len(ids)) + start
        kv: list[LayerKVPair] = []

        def attend(
            layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, **_: object
        ) -> torch.Tensor:
            keys = torch.zeros(len(ids), KV_HEADS, DIM, dtype=k.dtype) if moved is None else moved[layer_id].k.clone()
            values = torch.zeros_like(keys) if moved is None else moved[layer_id].v.clone()
            keys[rows], values[rows] = k, v
            kv.append(LayerKVPair(keys, values))
            return naive_attention(q, keys, values, rows, scale=scale)

        return self.run(ids[rows], positions[rows], attend)[-1], kv


class TinyHost:
    """A batch of prompts on a :class:`TinyModel`. Gives the logits of each one's last token, ``[prompts, VOCAB]``."""

    num_layers = LAYERS

    def __init__(self, model: TinyModel, prompts: Sequence[torch.Tensor]) -> None:
        self.model = model
        self.ids = torch.cat(list(prompts))
        self.last = torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1
        self.forwards: list[torch.Tensor] = []

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        self.forwards.append(rows)
        logits = self.model.run(self.ids[rows], positions, attend)
        return logits[torch.isin(rows, self.last)]


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention, one query and one head at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for i, position in enumerate(positions.tolist()):
        for head in range(q.shape[1]):
            weights = naive_weights(
                q[i, head], k[:, head // group], position, scale, sliding_window, softcap, sinks, known, head
            )
            out[i, head] = weights @ v[:, head // group]
    return out


def naive_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    position: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    known: torch.Tensor | None,
    head: int,
) -> torch.Tensor:
    scores = (k @ q) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    for j in range(len(k)):
        outside = sliding_window is not None and j <= position - sliding_window
        if j > position or outside or (known is not None and not known[j]):
            scores[j] = -torch.inf
    if sinks is None:
        return scores.softmax(0)
    return torch.cat([scores, sinks[head : head + 1].to(scores.dtype)]).softmax(0)[:-1]


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class TinyRope:
    """Re-rotation for :class:`TinyModel`, as a blend asks it of a :class:`lmcache.blend.rope.FusedRope`."""

    def fused_encode(
        self, old_positions: torch.Tensor, new_positions: torch.Tensor, k: torch.Tensor, **_: object
    ) -> torch.Tensor:
        k.copy_(rotate(k, (new_positions - old_positions).to(k.device)))
        return k


class Stored:
    """A passage's KV as it was computed; fails at one layer if told to."""

    def __init__(self, kv: Sequence[LayerKVPair], fails_at: int | None = None) -> None:
        self.kv = list(kv)
        self.fails_at = fails_at
        self.num_tokens = len(kv[0].k)
        self.length = self.num_tokens

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_id == self.fails_at:
            raise KVLoadError(f"layer {layer_id} was lost")
        return self.kv[layer_id].k, self.kv[layer_id].v
