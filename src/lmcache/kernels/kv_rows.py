"""KV of one layer as rows that lie anywhere in memory: an engine's pages, or a plain tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class KVRows:
    """Element ``d`` of head ``h`` of row ``i`` is ``offsets[i] + h · head_stride + d`` elements behind the first one of
    ``keys`` (and of ``values``).

    ``offsets`` (int64 ``[N]``, on the device) are the same in all layers of an engine; all are multiples of
    ``alignment``, as are the head strides.

    ``key_scale`` and ``value_scale`` (float32 ``[1]``, on the device) come with fp8 ``keys`` and ``values``, and only
    with those: real numbers are stored ones times that.
    """

    keys: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    num_heads: int
    dim: int
    value_dim: int
    key_head_stride: int
    value_head_stride: int
    alignment: int
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    def part(self, rows: slice) -> KVRows:
        return replace(self, offsets=self.offsets[rows])

    def at(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
    ) -> KVRows:
        """The same rows of another layer."""
        return replace(self, keys=keys, values=values, key_scale=key_scale, value_scale=value_scale)

    @classmethod
    def of_tensors(cls, keys: torch.Tensor, values: torch.Tensor) -> KVRows:
        """Rows of ``keys`` and ``values`` ``[N, heads, dim]`` of equal row strides."""
        if keys.stride(0) != values.stride(0):
            raise ValueError("keys and values must have equal strides from row to row")
        strides = (keys.stride(0), keys.stride(1), values.stride(1))
        return cls(
            keys=keys,
            values=values,
            offsets=torch.arange(len(keys), device=keys.device) * keys.stride(0),
            num_heads=keys.shape[1],
            dim=keys.shape[2],
            value_dim=values.shape[2],
            key_head_stride=keys.stride(1),
            value_head_stride=values.stride(1),
            alignment=power_of_two(math.gcd(*strides)),
        )


def power_of_two(number: int) -> int:
    """The largest power of two that divides ``number``, 64 at most."""
    return min(64, number & -number)
