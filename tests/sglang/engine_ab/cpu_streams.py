"""Streams for a device that has none: `LMCRadixCache` of generations A and B makes one for its loads and one for its
stores, and a CPU's cannot be made for a device, nor waited for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class CPUStream(torch.cpu.Stream):
    """Everything that is put on it is done at once."""

    device = torch.device("cpu")

    def __init__(self, device: Any = None, priority: int = -1) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def __enter__(self) -> CPUStream:
        return self

    def __exit__(self, *_: Any) -> None: ...


def install(*, as_cuda: bool) -> None:
    """``as_cuda``: also for SGLang up to 0.5.15, which asks for ``torch.cuda.Stream`` whatever the device is."""
    torch.cpu.Stream = CPUStream  # type: ignore[misc]
    if as_cuda:
        torch.cuda.Stream = CPUStream  # type: ignore[assignment, misc]
        torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, misc]
        torch.cuda.current_stream = lambda *_: CPUStream()  # type: ignore[assignment, return-value]
