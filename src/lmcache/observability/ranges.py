"""Named ranges for Nsight Systems: what the host does, and what it has the GPU do, phase by phase."""

from __future__ import annotations

from contextlib import ContextDecorator
from functools import cache
from types import TracebackType

import torch


class Range(ContextDecorator):
    """An NVTX range around a block or a function; nothing without CUDA. Without a profiler it costs a microsecond."""

    def __init__(self, name: str) -> None:
        self._name = f"lmcache: {name}"

    def __enter__(self) -> None:
        if _has_nvtx():
            torch.cuda.nvtx.range_push(self._name)  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _has_nvtx():
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


@cache
def _has_nvtx() -> bool:
    return torch.cuda.is_available()
