"""fp8 pages of an engine, as a blend in them has to know them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Fp8Pages:
    """In layer ``l`` real K are stored ones times ``scales[l][0]``, and V times ``scales[l][1]``.

    ``dtype`` is one of :data:`FP8_DTYPES`, whatever the engine calls its tensors (vLLM: bytes); ``computed`` that of
    the K and V that the model computes. ``device`` is where the pages are.
    """

    dtype: torch.dtype
    scales: tuple[tuple[float, float], ...]
    computed: torch.dtype
    device: torch.device

    @cached_property
    def table(self) -> torch.Tensor:
        """float32 ``[layers, 2, 4]``, on the device; the first of four is the scale. So each lies at a multiple of 16
        bytes, and kernels are compiled once for all of them."""
        return torch.tensor(self.scales, dtype=torch.float32)[:, :, None].repeat(1, 1, 4).to(self.device)

    @cached_property
    def of_layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The scales of K and V of each layer, as :class:`lmcache.kernels.kv_rows.KVRows` has them."""
        return [scales_in(layer) for layer in self.table]

    @cached_property
    def alike(self) -> bool:
        """Whether all layers have the same."""
        return len(set(self.scales)) == 1


def scales_in(layer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer of :attr:`Fp8Pages.table`."""
    return layer[0, :1], layer[1, :1]
