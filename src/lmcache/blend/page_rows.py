"""An engine's pages as the rows that kernels work on."""

from __future__ import annotations

import math

import torch

from lmcache.kernels.kv_rows import KVRows, power_of_two
from lmcache.paging.layout import KVLayout


def page_offsets(layout: KVLayout, slots: torch.Tensor) -> torch.Tensor:
    """Where in a plane the tokens with ``slots`` (int64 ``[N]``) lie, in elements: int64 ``[N]``.

    Raises:
        ValueError: the planes of a layer do not lie alike, so that one number a token does not tell.
    """
    if len(layout.planes) != 2 or layout.planes[0].strides != layout.planes[1].strides:
        raise ValueError(f"layout {layout.name!r}: K and V do not lie alike")
    return layout.token_offsets(slots, layout.planes[0])


def page_rows(layout: KVLayout, keys: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> KVRows:
    """``keys`` and ``values`` are a layer's :meth:`KVLayout.plane_views`, ``offsets`` those of :func:`page_offsets`."""
    block, token, head, _ = layout.planes[0].strides
    return KVRows(
        keys=keys,
        values=values,
        offsets=offsets,
        num_heads=layout.num_heads,
        dim=layout.head_dim,
        value_dim=layout.head_dim,
        key_head_stride=head,
        value_head_stride=head,
        alignment=power_of_two(math.gcd(block, token, head)),
    )
