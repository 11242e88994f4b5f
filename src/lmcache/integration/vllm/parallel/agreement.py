"""Ranks of one step go by each other's faults: what one of them could not load, none of them may keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class TensorParallelAgreement:
    """Over vLLM's own tensor-parallel group. Every rank must call in the same order: within a step, all are told the
    same.

    A rank that fails to fill pages spoils what all others compute in that forward, since each layer adds up what all
    of them have computed.
    """

    def __init__(self, group: Any) -> None:
        """``group``: torch's ``ProcessGroup`` of the ranks, for tensors on the CPU."""
        self._group = group

    @classmethod
    def of_vllm(cls) -> TensorParallelAgreement | None:
        """None where there is one rank."""
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        return cls(group.cpu_group) if group.world_size > 1 else None

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """For each of ``flags``, whether it is set in any rank. Waits for all of them."""
        tensor = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in tensor.tolist()]
