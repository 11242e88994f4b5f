"""Staging buffers on a device that copies over the bus pass through, one after the other, and their streams."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch


class StagingBuffer:
    """Room for some chunks on the device; ``free`` is the event of whoever used it last."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.free: torch.cuda.Event | None = None


class Sent(NamedTuple):
    """What is copied into a buffer; ``arrived`` is the event of its last byte."""

    buffer: StagingBuffer
    bytes: torch.Tensor
    arrived: torch.cuda.Event | None


class CopyRing:
    """The buffers of one direction, and its streams. One call at a time."""

    def __init__(self, device: torch.device, depth: int) -> None:
        self.device = device
        self.lock = threading.Lock()
        self._buffers = [StagingBuffer() for _ in range(depth)]
        self._next = 0

    @cached_property
    def stream(self) -> torch.cuda.Stream | None:
        """For copies over the bus."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @cached_property
    def kernels(self) -> torch.cuda.Stream | None:
        """For kernels that wait for copies of the past, which nobody else is to wait for."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def has_room(self, nbytes: int) -> bool:
        """Whether :meth:`take` would give memory that is there already."""
        return len(self._buffers[self._next].bytes) >= nbytes

    def take(self, nbytes: int) -> StagingBuffer:
        """The next buffer. Work on it must wait for its ``free``."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if len(buffer.bytes) < nbytes:
            buffer.bytes = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            buffer.free = None
            if self.stream is not None:
                # Memory that torch gives out again is free for the current stream only.
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
                buffer.bytes.record_stream(self.stream)
        return buffer


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def event_of(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    if stream is None:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def after(event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
    if event is not None and stream is not None:
        stream.wait_event(event)


def wait_for(stream: torch.cuda.Stream | None) -> None:
    """Without keeping a core busy."""
    if stream is not None:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(stream)
        done.synchronize()
