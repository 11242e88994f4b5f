"""What SGLang's HiCache needs of a GPU, on a CPU: events, memory that is not pinned, and one copy kernel.

SGLang imports its kernels for CUDA, ROCm and XPU alone, and makes pinned memory through CUDA. HiCache is otherwise as
it is: its trees, host pools, threads and its calls to a storage backend.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tests.sglang.engine_ab import cpu_streams


class CPUEvent:
    """Everything before it is done when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        """In milliseconds."""
        return 0.0


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy the slots ``src_indices`` of each tensor, whole pages, to ``dst_indices`` of its counterpart."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def install() -> None:
    """Before SGLang's scheduler is made; imports SGLang."""
    cpu_streams.install(as_cuda=False)
    torch.cpu.Event = CPUEvent  # type: ignore[misc, assignment]

    from sglang.srt.mem_cache.pool_host import base, mha

    init = base.HostKVCache.__init__

    @functools.wraps(init)
    def unpinned(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "pin_memory": False})

    base.HostKVCache.__init__ = unpinned
    mha.transfer_kv_direct = transfer_kv_direct
