"""How the attention of scattered queries is cut into programs."""

from __future__ import annotations

from functools import cache

import torch


def tile(
    rows: int, kv_heads: int, block_d: int, q: torch.Tensor, *, is_band: bool = False
) -> tuple[int, int, int, int]:
    """Queries × heads of a group, keys, warps and stages of a program.

    Args:
        rows: queries × heads of a group.
        block_d: elements of a head, rounded up to a power of two.
        is_band: other code has computed all but a band of keys before each query.
    """
    if q.dtype == torch.float32:
        return 32, 32, 4, 1
    if block_d > 128:
        return 64, 64, 4, 2
    # A band is few keys: where large tiles leave multiprocessors idle, small ones are faster (58 µs against 64 for
    # 409 of 16,384 tokens on an H200).
    if rows <= 64 or (is_band and -(-rows // 128) * kv_heads < 2 * _multiprocessors(q.device)):
        return 64, 64, 4, 3
    return 128, 128, 8, 2


def masked_stages(*, is_fp8: bool, is_padded: bool) -> int:
    """Of the loop that masks keys: Triton's default. Of fp8 heads whose size is no power of two Triton 3.6 would copy
    single bytes asynchronously, which a GPU cannot, and compile nothing."""
    return 1 if is_fp8 and is_padded else 3


def parts_of_keys(programs: int, num_keys: int, block_n: int, device: torch.device) -> int:
    """Enough for two programs a multiprocessor, none with fewer than eight blocks of keys."""
    if device.type != "cuda":
        return 1
    wanted = 2 * _multiprocessors(device) // programs
    return int(max(1, min(wanted, num_keys // (8 * block_n))))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
