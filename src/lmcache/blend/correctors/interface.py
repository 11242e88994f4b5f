"""A corrector: moves the reused keys and values that are *not* recomputed, by what the recomputed ones show."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch

from lmcache.blend.rope import FusedRope

if TYPE_CHECKING:
    from lmcache.kernels.kv_rows import KVLayers, KVRows

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


class RowAccess(Protocol):
    """K and V of a layer, wherever its rows lie. ``rows`` are int32 ``[n]`` on the device; −1 stands for none.

    ``kernel_rows`` are the rows as kernels take them.
    """

    @property
    def kernel_rows(self) -> KVRows: ...

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies, ``[n, kv_heads, dim]`` each; zero for none."""

    def add(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add to some rows, each at most once: in float32, rounded once."""


@dataclass(frozen=True)
class RowCorrection:
    """As :class:`LayerCorrection`, of KV that is read and changed by rows. ``rows`` are on the CPU."""

    layer_id: int
    kv: RowAccess
    rows: torch.Tensor
    fresh_keys: torch.Tensor
    fresh_values: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    memo: Memo


@dataclass(frozen=True)
class RowsAhead:
    """Rows that will be fresh in every layer: ``rows`` (int64, on the CPU), computed in ``dtype``.

    ``layers(first, n)``: the moved KV of layer ``first``, and of as many behind it as a kernel may treat together with
    it, ``n`` in all at most; it is in place then. ``in_place``: that of all layers is already. ``kv`` are the same rows
    of some layer. ``spans`` and ``memo`` are those of the :class:`RowCorrection` to come.
    """

    rows: torch.Tensor
    dtype: torch.dtype
    spans: tuple[tuple[int, int], ...]
    memo: Memo
    kv: KVRows
    layers: Callable[[int, int], KVLayers]
    in_place: bool


class Corrector(ABC):
    """Called once a layer, after the fresh K and V are known and before they overwrite the moved ones. Stateless.

    ``alike_in_layers``: on a GPU it queues the same work for every layer with the same rows, and waits for nothing, so
    that what it did for one layer may be recorded and replayed for others.
    """

    name: ClassVar[str]
    alike_in_layers: ClassVar[bool] = False

    @abstractmethod
    def correct(self, layer: LayerCorrection) -> None:
        """Change ``layer.keys`` and ``layer.values`` in place, inside the spans only.

        What is written to rows that were computed afresh does not matter: these are overwritten next. A span without a
        fresh row stays as it is.
        """


class BatchedCorrector(Corrector):
    """A corrector that can treat all passages of a layer together, as an accelerator wants it."""

    @abstractmethod
    def correct_rows(self, layer: RowCorrection) -> None:
        """What :meth:`correct` does, up to rounding."""

    def preparation(self, ahead: RowsAhead) -> Callable[[int], None] | None:
        """To be called with a layer's number before :meth:`correct_rows`, which must come next, once: does what does
        not hang on fresh rows. It is never recorded, so it may do the work of several layers at a time."""
        return None
