"""Stand-in until the core of generation C is merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcache.paging.detect import PageHints, detect_pool_layout
from lmcache.paging.interface import GPUConnectorInterface
from lmcache.paging.token_connector import TokenConnector


def pools_connector(k_pool: Sequence[torch.Tensor], v_pool: Sequence[torch.Tensor]) -> GPUConnectorInterface:
    _, heads, dim = k_pool[0].shape
    layout = detect_pool_layout(k_pool, v_pool, PageHints(block_size=1, num_kv_heads=heads, head_dim=dim))
    return TokenConnector(layout, [*k_pool, *v_pool])
