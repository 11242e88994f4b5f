"""Tensor-parallel ranks decide alike: each has its own share of the KV, and may find less of it than the others."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def min_over_ranks(value: int, tp_group: Any, device: torch.device) -> int:
    """The smallest ``value`` of all ranks; every rank must call this, in the same order.

    Args:
        tp_group: a torch ``ProcessGroup``, or SGLang's ``GroupCoordinator``; None for a single rank.
        device: one that the group can reduce on.
    """
    group = getattr(tp_group, "device_group", tp_group)
    if group is None or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=group)
    return int(tensor.item())
