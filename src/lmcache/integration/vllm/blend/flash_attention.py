"""vLLM's FlashAttention 3, for the part of a blend's attention that needs no mask."""

from __future__ import annotations

from typing import Any

import torch

from lmcache.blend.dense_runs import DenseAttention, DenseRuns, dense_runs, run_tokens
from lmcache.observability.logging import init_logger

logger = init_logger(__name__)

_KEYS, _BLOCK = 6144, 16
# Few queries and many: keys are cut into parts for few, and our kernel takes other tiles for them, which are compiled
# when they are tried.
_APART = (32, 2)
# Queries × heads of a group that FlashAttention takes together
_TILE = 128
# Two roundings of bfloat16 apart
_TOLERANCE = 1e-2


def flash_attention(layer: Any) -> DenseAttention | None:
    """None where vLLM does not run ``layer`` by FlashAttention 3."""
    if getattr(layer.impl, "vllm_flash_attn_version", None) != 3:
        return None
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError as missing:
        logger.info("CacheBlend attends by its own kernel alone: %s", missing)
        return None

    group = layer.num_heads // layer.num_kv_heads
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count

    def attend(
        q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, runs: DenseRuns, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        programs = len(runs.keys) * -(-runs.tokens * group // _TILE) * layer.num_kv_heads
        attended: tuple[torch.Tensor, torch.Tensor] = flash_attn_varlen_func(
            q=q.index_select(0, runs.order),
            k=key_pages,
            v=value_pages,
            max_seqlen_q=runs.tokens,
            cu_seqlens_q=runs.starts,
            max_seqlen_k=runs.most_keys,
            seqused_k=runs.keys_in_order,
            block_table=runs.blocks,
            softmax_scale=scale,
            causal=False,
            return_softmax_lse=True,
            num_splits=parts_of_keys(programs, multiprocessors),
            fa_version=3,
        )
        return attended

    try:
        error = max(_error(attend, layer, apart) for apart in _APART)
    except Exception as problem:
        logger.warning("CacheBlend attends by its own kernel alone: FlashAttention failed when tried: %s", problem)
        return None
    if not error < _TOLERANCE:
        logger.warning("CacheBlend attends by its own kernel alone: FlashAttention's part is off by %.1e", error)
        return None
    return attend


def parts_of_keys(programs: int, multiprocessors: int) -> int:
    """That the keys are cut into for FlashAttention; 0: as it likes, which is slow where its programs are few.

    On an H200 444 queries over 16,464 keys take 174 µs so, and 156 in two parts. Where programs fill the GPU it chooses
    well: in one part the second pass of a blend of 8,272 tokens at 15 % took 0.06 ms a layer longer.
    """
    parts = round(1.5 * multiprocessors / programs)
    return parts if parts > 1 else 0


def _error(attend: DenseAttention, layer: Any, apart: int) -> float:
    """How far attention with FlashAttention's part is from attention without, on noise, of queries that stand ``apart``
    keys from each other: ‖difference‖ / ‖without‖."""
    from lmcache.kernels.kv_rows import KVRows
    from lmcache.kernels.sparse_attention import SeenByAll, sparse_attention

    keys, values = torch.randn(2, _KEYS, layer.num_kv_heads, layer.head_size, device="cuda").to(torch.bfloat16)
    positions = torch.arange(_KEYS - 1, 0, -apart).flip(0)
    q = torch.randn(len(positions), layer.num_heads, layer.head_size, device="cuda").to(torch.bfloat16)
    tokens = run_tokens(layer.num_heads // layer.num_kv_heads)
    runs = dense_runs(positions, torch.arange(_KEYS // _BLOCK, dtype=torch.int32, device="cuda"), q.device, tokens)
    scale = layer.head_size**-0.5
    at, rows = positions.to("cuda", torch.int32), KVRows.of_tensors(keys, values)
    pages = [plane.view(-1, _BLOCK, *plane.shape[1:]) for plane in (keys, values)]
    out, lse = attend(q, pages[0], pages[1], runs, scale)
    joined, _ = sparse_attention(q, rows, at, scale=scale, seen_by_all=SeenByAll(runs.tokens, runs.keys, out, lse))
    alone, _ = sparse_attention(q, rows, at, scale=scale)
    return float((joined.float() - alone.float()).norm() / alone.float().norm())
