"""What only a run tells about a model: tried once on a few tokens, before anything is blended.

A blend stands on this: a token's row goes through the model by itself but for attention, and position changes K by the
rotation of its rotary module, or not at all, and V not at all. Models differ in which layers they rotate, and not every
layer that has a rotary module uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lmcache.blend.rope import FusedRope
from lmcache.integration.blend.model import EngineModel, UnsupportedModelError

_TOKENS = 16
_SHIFT = 1000
# Of the length of a token's K or V. What is wrong differs by much more than what is rounded.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class _Recorder:
    """An ``attend`` that keeps K and V. Its output is zero: no row knows of any other, and K and V depend on nothing
    but token and position."""

    layers: list[int] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def __call__(
        self, layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **scoring: object
    ) -> torch.Tensor:
        self.layers.append(layer_id)
        self.keys.append(k.clone())
        self.values.append(v.clone())
        return q.new_zeros(*q.shape[:2], v.shape[-1])


def ropes_in_use(model: EngineModel, ropes: Sequence[FusedRope | None]) -> list[FusedRope | None]:
    """``ropes``, with None for the layers that turn out not to rotate their keys.

    Args:
        ropes: one a layer, of its rotary module.

    Raises:
        UnsupportedModelError: the K and V that the model computes are not what a blend relies on, or it cannot be run.
    """
    ids = torch.randint(0, model.vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(1, _TOKENS, 2)
    shift = max(0, min(_SHIFT, model.max_positions - _TOKENS))
    among_all = _run(model, ids, torch.arange(_TOKENS))
    elsewhere = _run(model, ids[rows], rows + shift)
    in_use: list[FusedRope | None] = []
    for layer, rope in enumerate(ropes):
        if not _equal(among_all.values[layer][rows], elsewhere.values[layer]):
            raise UnsupportedModelError(
                model.model,
                f"values of layer {layer} depend on their position, or on neighbours by another way than attention",
            )
        keys, moved = among_all.keys[layer][rows], elsewhere.keys[layer]
        if rope is not None and _equal(rope.fused_encode(rows, rows + shift, keys.clone()), moved):
            in_use.append(rope)
        elif _equal(keys, moved):
            in_use.append(None)
        else:
            raise UnsupportedModelError(
                model.model, f"keys of layer {layer} at other positions are not what its rotary module makes of them"
            )
    return in_use


def _run(model: EngineModel, ids: torch.Tensor, positions: torch.Tensor) -> _Recorder:
    recorder = _Recorder()
    try:
        model.run(ids, positions, recorder)
    except Exception as error:
        raise UnsupportedModelError(model.model, f"it does not run by itself: {error!r}") from error
    expected = list(range(len(model.layers)))
    if recorder.layers != expected:
        raise UnsupportedModelError(model.model, f"its layers run in the order {recorder.layers}, not {expected}")
    return recorder


def _equal(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether most tokens are alike. A few may not be: rounding sends some to other experts."""
    error = (expected.float() - found.float()).flatten(1).norm(dim=1)
    size = expected.float().flatten(1).norm(dim=1).clamp_min(1e-30)
    return bool((error / size).median() <= _TOLERANCE[expected.dtype])  # False for NaN
