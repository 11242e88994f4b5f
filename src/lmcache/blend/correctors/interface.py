"""A corrector: moves the reused keys and values that are *not* recomputed, by what the recomputed ones show."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch

from lmcache.blend.rope import FusedRope

Memo: TypeAlias = "dict[Any, Any]"


@dataclass(frozen=True)
class LayerCorrection:
    """One layer, before its attention.

    ``keys`` ``[N, kv_heads, dim]`` and ``values`` are the moved KV of the whole batch, to be changed in place. Row
    ``rows[i]`` was computed afresh (rows ascend): ``fresh_keys[i]``, ``fresh_values[i]``. A span is the half-open row
    range of one reused passage. ``positions`` (int64 ``[N]``) and ``rope`` (None: the layer has none) let one think in
    un-rotated keys. ``memo`` is the same for all layers with these ``rows``: for what no layer changes.
    """

    layer_id: int
    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    fresh_keys: torch.Tensor
    fresh_values: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    positions: torch.Tensor
    rope: FusedRope | None
    memo: Memo = field(default_factory=dict)


class Corrector(ABC):
    """Called once a layer, after the fresh K and V are known and before they overwrite the moved ones. Stateless."""

    name: ClassVar[str]

    @abstractmethod
    def correct(self, layer: LayerCorrection) -> None:
        """Change ``layer.keys`` and ``layer.values`` in place, inside the spans only.

        What is written to rows that were computed afresh does not matter: these are overwritten next. A span without a
        fresh row stays as it is.
        """
