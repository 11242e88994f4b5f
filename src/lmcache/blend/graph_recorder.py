"""Work on a GPU, recorded as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lmcache.memory.slab import forget_cuda_error
from lmcache.observability.logging import init_logger

logger = init_logger(__name__)


class Recording(Protocol):
    """Recorded work."""

    def replay(self) -> torch.Tensor | None:
        """Queue it once more, on the current stream; what it gives, if anything, is overwritten by the next replay."""


class WorkRecorder(Protocol):
    """Records the same memory being worked on again and again."""

    def record(self, work: Callable[[], torch.Tensor | None]) -> Recording | None:
        """``work``, which is not done yet; None: it cannot be recorded."""

    def forget(self) -> None:
        """Nothing of what was recorded will be replayed any more."""


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, out: torch.Tensor | None) -> None:
        self._graph = graph
        self._out = out

    def replay(self) -> torch.Tensor | None:
        self._graph.replay()
        return self._out


class GraphRecorder:
    """A :class:`WorkRecorder` by CUDA graphs. What a graph keeps for itself comes from memory that later ones reuse, so
    graphs that are still wanted must not be replayed out of the order of one stream."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._works = True
        self._recorded: list[Recording] = []
        # Memory stays with the pool for as long as any graph has some of it.
        self._first = self.record(lambda: torch.zeros(1, device=device))

    def record(self, work: Callable[[], torch.Tensor | None]) -> Recording | None:
        """See :class:`WorkRecorder`."""
        if not self._works:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with no_garbage_collection(), torch.cuda.stream(self._stream):
                begin_capture(graph, self._pool)
                try:
                    out = work()
                finally:
                    graph.capture_end()
        except Exception as error:
            self._works = False
            recover_from_capture()
            logger.warning("CacheBlend starts each of its kernels by itself: they cannot be recorded: %s", error)
            return None
        self._recorded.append(_Graph(graph, out))
        return self._recorded[-1]

    def forget(self) -> None:
        """See :class:`WorkRecorder`. Until then they are kept: to let a graph go may wait until it has run."""
        self._recorded.clear()


def begin_capture(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """On the current stream; other threads go on copying meanwhile."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")


def recover_from_capture() -> None:
    """After a capture that failed: torch's random numbers stay in the state of one until the next one ends."""
    forget_cuda_error()
    with no_garbage_collection(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        begin_capture(graph, torch.cuda.graph_pool_handle())
        torch.zeros(1, device="cuda")
        graph.capture_end()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What it frees may take calls to CUDA that spoil a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
