"""SGLang's KV: a pool of slots a layer for K, and one for V."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcache.paging.detect import PageHints, detect_pool_layout
from lmcache.paging.token_connector import TokenConnector


def pools_connector(
    k_pool: Sequence[torch.Tensor], v_pool: Sequence[torch.Tensor] | None, page_size: int = 1
) -> TokenConnector:
    """Moves tokens between the pools, one ``[slots, heads, dim]`` a layer each, and chunks that are token-major.

    Slots are moved one by one, so ``page_size`` only counts where they are too many to be a multiple of it.

    Args:
        v_pool: None for MLA, whose only pools are ``[slots, 1, latent + rope]``.

    Raises:
        UnknownLayoutError: the pools are not of this form; the message says what they are.
    """
    slots, heads, dim = k_pool[0].shape
    size = page_size if slots % page_size == 0 else 1
    layout = detect_pool_layout(k_pool, v_pool, PageHints(block_size=size, num_kv_heads=heads, head_dim=dim))
    return TokenConnector(layout, [*k_pool, *(v_pool or ())])
