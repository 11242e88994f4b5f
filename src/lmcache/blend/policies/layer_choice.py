"""Layers as a user names them, and what they are in a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeGuard

LayerChoice = Literal["late"] | tuple[float, float] | Sequence[int] | None
_LATE = (0.6, 1.0)


def check_layer_choice(layers: LayerChoice) -> None:
    """Raises ValueError for what is a choice in no model."""
    if isinstance(layers, str) and layers != "late":
        raise ValueError(f"layers={layers!r}: must be None for all, 'late', a list of numbers, or shares of the depth")
    if layers is not None and not len(layers):
        raise ValueError("layers=[]: name at least one layer, or give None for all")
    if _is_range(layers) and not (len(layers) == 2 and 0 <= layers[0] < layers[1] <= 1):
        raise ValueError(f"layers={layers}: shares of the depth are two that rise within 0.0 … 1.0, as (0.4, 1.0)")


def chosen_layers(layers: LayerChoice, num_layers: int) -> Sequence[int] | None:
    """Numbers of layers; None for all.

    Raises:
        ValueError: there is no such layer.
    """
    if layers is None:
        return None
    if isinstance(layers, str):
        layers = _LATE
    if _is_range(layers):
        return range(math.floor(layers[0] * num_layers), math.ceil(layers[1] * num_layers))
    numbers = [int(layer) for layer in layers]
    check_in_model("layers", numbers, num_layers)
    return numbers


def check_in_model(option: str, layers: Sequence[int], num_layers: int) -> None:
    """Raises ValueError if one of ``layers`` is not in the model."""
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(f"{option}={list(layers)}: the model has layers 0 … {num_layers - 1}, not {outside[0]}")


def _is_range(layers: LayerChoice) -> TypeGuard[tuple[float, float]]:
    return layers is not None and any(isinstance(layer, float) for layer in layers)
