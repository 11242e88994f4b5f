"""Ranks decide alike: each has its own share of the KV, and may find less of it than the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def all_reduce(tensor: torch.Tensor, op: Any, groups: Iterable[Any]) -> None:
    """Reduce ``tensor`` in place over ``groups``, one after the other; every rank must call this, in the same order.

    Args:
        groups: torch ``ProcessGroup``s, or SGLang's ``GroupCoordinator``s, that can reduce where ``tensor`` lies; None
            stands for a single rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    for given in groups:
        on_cpu = tensor.device.type == "cpu"
        group = getattr(given, "cpu_group" if on_cpu else "device_group", given)
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(tensor, op=op, group=group)


def min_over_ranks(value: int, groups: Iterable[Any], device: torch.device | str = "cpu") -> int:
    """The smallest ``value`` of all ranks of ``groups``; see :func:`all_reduce`."""
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    all_reduce(tensor, dist.ReduceOp.MIN, groups)
    return int(tensor.item())
