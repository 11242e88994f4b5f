"""SGLang's pools of slots as pages of one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcache.paging.detect import PageHints, detect_pool_layout
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.paging.token_connector import TokenConnector


def pools_connector(k_pool: Sequence[torch.Tensor], v_pool: Sequence[torch.Tensor]) -> GPUConnectorInterface:
    """Moves tokens between chunks and ``k_pool`` and ``v_pool``, one tensor ``[slots, heads, dim]`` a layer.

    Raises:
        UnknownLayoutError: the pools are laid out otherwise, or K and V differ.
    """
    shape = k_pool[0].shape
    hints = PageHints(block_size=1, num_kv_heads=shape[1], head_dim=shape[-1], engine="SGLang")
    return TokenConnector(detect_pool_layout(k_pool, v_pool, hints), [*k_pool, *v_pool])
