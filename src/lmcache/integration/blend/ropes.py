"""The rope of every attention layer of a model that an engine has loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from lmcache.blend.rope import FusedRope, UnsupportedRopeError
from lmcache.blend.rope_from_module import rope_from_module
from lmcache.integration.blend.model import EngineModel, UnsupportedModelError
from lmcache.integration.blend.trial import ropes_in_use


def find_ropes(model: EngineModel) -> list[FusedRope | None]:
    """One a layer, in order; None for a layer whose keys do not depend on position.

    They are those of the rotary modules beside the attention layers, tried out on a few tokens.

    Raises:
        UnsupportedModelError: a layer has no rotary module, its RoPE cannot be moved, or the keys that it computes are
            not what its rotary module makes of them.
    """
    rotary = {id(layer): module for layer, module in _rotary_modules(model.model)}
    # Layers share rotary modules, and to read a rope from one takes milliseconds.
    ropes: dict[nn.Module | None, FusedRope | None] = {None: None}
    found = []
    for name, layer in model.layers.items():
        if id(layer) not in rotary:
            raise UnsupportedModelError(model.model, f"there is no rotary_emb beside {name}")
        module = rotary[id(layer)]
        if module not in ropes:
            try:
                ropes[module] = rope_from_module(module)
            except UnsupportedRopeError as error:
                raise UnsupportedModelError(model.model, str(error)) from None
        found.append(ropes[module])
    return ropes_in_use(model, found)


def _rotary_modules(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Modules, each with the ``rotary_emb`` that stands beside it; None where the model says that there is none."""
    for parent in model.modules():
        if hasattr(parent, "rotary_emb"):
            for child in parent.children():
                yield child, cast("nn.Module | None", parent.rotary_emb)
