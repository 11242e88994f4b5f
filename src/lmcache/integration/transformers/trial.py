"""What only a run tells about a model: tried once on a few tokens, before anything is blended.

A blend stands on three facts. A token's row goes through the model by itself: nothing but attention looks at other
rows. Position changes K by the rotation that the config tells of, and nothing else. Our attention does what the model's
does. A model whose code does more (a convolution over tokens, learned positions, another rotation) is found out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from lmcache.blend.attention import QueryMask, sparse_attention
from lmcache.blend.rope import FusedRope
from lmcache.integration.transformers.host import TransformersModel
from lmcache.integration.transformers.supported import unsupported

_TOKENS = 16
_SHIFT = 1000
# Of the length of a token's K or V. What is wrong differs by much more than what is rounded.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class _Recorder:
    """An ``attend`` that keeps what each layer gives it. Its output is attention over the rows at hand, or zero: then
    no row knows of any other, and K and V depend on nothing but token and position."""

    attends: bool
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)

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
        self.layers.append(layer_id)
        self.keys.append(k)
        self.values.append(v)
        self.windows.append(sliding_window)
        if not self.attends:
            return q.new_zeros(*q.shape[:2], v.shape[-1])
        mask = QueryMask(torch.arange(len(q), device=q.device), sliding_window)
        return sparse_attention(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)


def try_out(model: TransformersModel, ropes: Sequence[FusedRope | None]) -> None:
    """Run a few tokens through ``model`` and look at the K and V of every layer.

    Raises:
        UnsupportedModelError: they are not what a blend relies on.
    """
    ids = torch.randint(0, model.vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(_TOKENS)
    alone = _run(model, ids, positions, _Recorder(attends=False))
    if alone.layers != list(range(model.num_layers)):
        raise unsupported(
            model.model, f"attention runs in layers {alone.layers}, expected each of {model.num_layers} once, in order"
        )
    _check_rows(model, ropes, ids, positions, alone)
    _check_attention(model, ids, _run(model, ids, positions, _Recorder(attends=True)))


def _run(model: TransformersModel, ids: torch.Tensor, positions: torch.Tensor, recorder: _Recorder) -> _Recorder:
    model.logits(ids, positions, torch.tensor([len(ids) - 1]), recorder)
    return recorder


def _check_rows(
    model: TransformersModel,
    ropes: Sequence[FusedRope | None],
    ids: torch.Tensor,
    positions: torch.Tensor,
    alone: _Recorder,
) -> None:
    """Every other row elsewhere, against the same rows among all."""
    longest = getattr(model.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    shift = min(_SHIFT, (longest or _SHIFT + _TOKENS) - _TOKENS)
    rows = torch.arange(1, _TOKENS, 2)
    moved = _run(model, ids[rows], positions[rows] + shift, _Recorder(attends=False))
    for layer, rope in enumerate(ropes):
        keys = alone.keys[layer][rows]
        if rope is not None:
            rope.fused_encode(rows, rows + shift, keys, old_length=_TOKENS, new_length=_TOKENS + shift)
        if _differ(alone.values[layer][rows], moved.values[layer]):
            raise unsupported(
                model.model,
                f"values of layer {layer} depend on their position, or on neighbours by another way than attention",
            )
        if _differ(keys, moved.keys[layer]):
            raise unsupported(
                model.model,
                f"keys of layer {layer} at other positions are not what the RoPE in its config makes of them "
                "(weights that were cast with half() or to() take the frequencies along: pass dtype= when loading)",
            )


def _check_attention(model: TransformersModel, ids: torch.Tensor, ours: _Recorder) -> None:
    """Against the model's own forward."""
    cache = DynamicCache(config=model.model.config)
    device = model.model.get_input_embeddings().weight.device
    with torch.no_grad():
        model.model(input_ids=ids[None].to(device), past_key_values=cache, use_cache=True)
    for layer, theirs in enumerate(cache.layers):
        window: Any = getattr(theirs, "sliding_window", None)
        if window != ours.windows[layer]:
            raise unsupported(
                model.model,
                f"layer {layer} tells its attention function of a sliding window of {ours.windows[layer]}, its config "
                f"of {window}",
            )
        kept = theirs.keys.shape[2]  # a sliding layer keeps only the last ones
        for name, fresh, held in (("keys", ours.keys, theirs.keys), ("values", ours.values, theirs.values)):
            if _differ(held[0].transpose(0, 1), fresh[layer][-kept:]):
                raise unsupported(
                    model.model,
                    f"{name} of layer {layer} differ from those of its own forward: its attention does more",
                )


def _differ(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether most tokens differ. A few may: rounding sends some to other experts."""
    if expected.shape != found.shape:
        return True
    error = (expected.float() - found.float()).flatten(1).norm(dim=1)
    size = expected.float().flatten(1).norm(dim=1).clamp_min(1e-30)
    return not bool((error / size).median() <= _TOLERANCE[expected.dtype])  # so that NaN differs
