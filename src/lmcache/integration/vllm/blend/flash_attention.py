"""vLLM's FlashAttention 3, for the part of a blend's attention that needs no mask."""

from __future__ import annotations

from typing import Any

import torch

from lmcache.blend.dense_runs import RUN_TOKENS, DenseAttention, DenseRuns
from lmcache.observability.logging import init_logger

logger = init_logger(__name__)


def flash_attention(layer: Any) -> DenseAttention | None:
    """None where vLLM does not run ``layer`` by FlashAttention 3."""
    if getattr(layer.impl, "vllm_flash_attn_version", None) != 3:
        return None
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError as error:
        logger.info("CacheBlend attends by its own kernel alone: %s", error)
        return None

    def attend(
        q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, runs: DenseRuns, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flash_attn_varlen_func(
            q=q,
            k=key_pages,
            v=value_pages,
            max_seqlen_q=RUN_TOKENS,
            cu_seqlens_q=runs.starts,
            max_seqlen_k=runs.most_keys,
            seqused_k=runs.keys,
            block_table=runs.blocks,
            softmax_scale=scale,
            causal=False,
            return_softmax_lse=True,
            fa_version=3,
        )
        return out.contiguous(), lse.contiguous()

    return attend
