"""Choosing how the KV of a layout is moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcache.kernels.availability import kernels_for
from lmcache.paging.block_connector import BlockConnector
from lmcache.paging.layout import KVLayout
from lmcache.paging.paged_connector import PagedConnector
from lmcache.paging.staged_connector import StagedConnector
from lmcache.paging.token_connector import TokenConnector


def make_connector(
    kv_layout: KVLayout,
    tensors: Sequence[torch.Tensor],
    chunk_size: int,
    *,
    token_major: bool = False,
    background_saves: bool = False,
) -> PagedConnector:
    """The fastest connector for these pages: whole pages if they are in host memory and chunks consist of them.

    Args:
        tensors: as :class:`KVLayout` describes them.
        chunk_size: tokens in a chunk; chunks of the connector begin at multiples of it.
        token_major: chunks that every engine reads, where the pages can be taken apart.
        background_saves: of :class:`~lmcache.paging.staged_connector.StagedConnector`.

    Raises:
        ValueError: the pages are packed and nothing moves them whole; the message says what to change.
    """
    divides = chunk_size % kv_layout.block_size == 0
    on_cpu = tensors[0].device.type == "cpu"
    if on_cpu and divides and kv_layout.page is not None and (kv_layout.packed or not token_major):
        return BlockConnector(kv_layout, tensors)
    if kv_layout.packed:
        raise ValueError(
            f"layout {kv_layout.name!r} packs its pages, so they can only be moved whole, in host memory: chunk_size="
            f"{chunk_size} must be a multiple of the engine's block size {kv_layout.block_size}"
            + ("" if on_cpu else f", and the pages are on {tensors[0].device}")
        )
    if tensors[0].device.type == "cuda" and kernels_for(tensors[0].device) and kv_layout.planes[0].strides[3] == 1:
        return StagedConnector(kv_layout, tensors, background_saves=background_saves)
    return TokenConnector(kv_layout, tensors)
