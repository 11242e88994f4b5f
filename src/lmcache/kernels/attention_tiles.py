"""How the attention of scattered queries is cut into programs.

What stands here was measured on an H200, for 32 query and 8 KV heads of 128 in bfloat16: 32 to 2,494 queries over 4,176
to 32,848 keys.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TypeAlias

import numpy as np
import torch

# A program's beginning and end, in tiles of keys.
_BEGIN = 6
_MOST_PARTS = 16
_MOST_PART_BYTES = 64 << 20
# So many programs for each that runs at a time even out by themselves, and larger tiles are faster.
_MANY = 4

Tile: TypeAlias = tuple[int, int, int, int]
"""Queries × heads of a group, keys, warps and stages of a program."""


def padded_dim(dim: int, value_dim: int) -> int:
    """Elements of a head, rounded up to a power of two."""
    return max(16, 1 << (max(dim, value_dim) - 1).bit_length())


def tiles(block_d: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The one for few queries first, and that for many, where it is another one."""
    if dtype == torch.float32:
        return ((32, 32, 4, 1),)
    if block_d > 128:
        return ((64, 64, 4, 2),)
    return (64, 64, 4, 3), (128, 128, 8, 2)


def tile(rows: int, kv_heads: int, block_d: int, q: torch.Tensor, *, is_band: bool = False) -> Tile:
    """The one that is fastest.

    Args:
        rows: queries × heads of a group.
        block_d: see :func:`padded_dim`.
        is_band: other code has computed all but a band of keys before each query.
    """
    found = tiles(block_d, q.dtype)
    is_few = is_band or -(-rows // found[0][0]) * kv_heads <= _MANY * _at_once(block_d, q.device)
    return found[0 if is_few else -1]


def masked_stages(*, is_fp8: bool, is_padded: bool) -> int:
    """Of the loop that masks keys: Triton's default. Of fp8 heads whose size is no power of two Triton 3.6 would copy
    single bytes asynchronously, which a GPU cannot, and compile nothing."""
    return 1 if is_fp8 and is_padded else 3


def blocks_seen(
    num_queries: int,
    group: int,
    num_keys: int,
    blocks: Tile,
    positions: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> tuple[int, ...]:
    """Of each tile of queries, how many tiles of keys are between the first and the last one that it sees.

    Args:
        positions: int64 ``[num_queries]``, on the CPU, ascending. None: taken to lie evenly over the keys.
    """
    block_m, block_n = blocks[:2]
    at = np.arange(1, num_queries + 1) * num_keys // num_queries - 1 if positions is None else positions.numpy()
    begins = np.arange(0, num_queries * group, block_m)
    end = at[(np.minimum(begins + block_m, num_queries * group) - 1) // group] // block_n + 1
    if sliding_window is None:
        return tuple(end.tolist())
    return tuple((end - np.maximum(at[begins // group] - sliding_window + 1, 0) // block_n).tolist())


@lru_cache(maxsize=256)
def blocks_of_a_part(seen: tuple[int, ...], kv_heads: int, part_bytes: int, block_d: int, device: torch.device) -> int:
    """Tiles of keys that one program reads at most: as many as let all programs end soonest.

    Tiles of early queries see few keys, and are cut into fewer parts.

    Args:
        seen: see :func:`blocks_seen`.
        part_bytes: what the outcome of one part takes.
    """
    most, at_once = max(seen), _at_once(block_d, device)
    best, soonest = most, float("inf")
    if device.type == "cuda" and len(seen) * kv_heads <= _MANY * at_once:
        of_tiles = np.array(seen)
        for parts in range(1, min(_MOST_PARTS, most, max(1, _MOST_PART_BYTES // part_bytes)) + 1):
            each = -(-most // parts)
            programs = kv_heads * int((-(-of_tiles // each)).sum())
            ends = -(-programs // at_once) * (each + _BEGIN)
            if ends < soonest:
                best, soonest = each, ends
    return best


@cache
def _at_once(block_d: int, device: torch.device) -> int:
    """Programs that a GPU runs at a time: two fit into a multiprocessor where heads are small."""
    if device.type != "cuda":
        return 1
    return (2 if block_d <= 128 else 1) * int(torch.cuda.get_device_properties(device).multi_processor_count)
