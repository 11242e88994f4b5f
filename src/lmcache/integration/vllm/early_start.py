"""Which steps are started as soon as they are planned, while vLLM prepares their forward."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from lmcache.integration.vllm.connector_metadata import LMCacheConnectorMetadata


class Place(NamedTuple):
    """Where a step runs. ``stream``: None on a CPU."""

    thread: int
    stream: torch.cuda.Stream | None

    @staticmethod
    def here(device: torch.device) -> Place:
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        return Place(threading.get_ident(), stream)


class EarlyStart:
    """Decides for each step. One with loads or blends gives the GPU something to do in the milliseconds that vLLM takes
    to prepare a forward, if scheduler and worker share a thread and a stream, which the first such step tells.

    ``in_step``: whether vLLM still has a call to make for an earlier step.
    """

    def __init__(self, in_step: Callable[[], bool]) -> None:
        self._in_step = in_step
        self._begun: LMCacheConnectorMetadata | None = None
        self._steps_run: Place | None = None

    def begins(self, meta: LMCacheConnectorMetadata, device: torch.device) -> bool:
        """Whether ``meta``, just planned, is to be started now; if so, :meth:`has_begun` tells it to its forward."""
        if not meta.fills_pages or self._steps_run is None or self._begun is not None or self._in_step():
            return False
        if self._steps_run != Place.here(device):
            return False
        self._begun = meta
        return True

    def has_begun(self, meta: LMCacheConnectorMetadata, device: torch.device) -> bool:
        """Whether ``meta``, whose forward is next, was started. If so, what is queued from now on comes after it."""
        begun, self._begun = self._begun, None
        if not meta.fills_pages:
            return False
        here, before = Place.here(device), self._steps_run
        self._steps_run = here
        if meta is not begun:
            return False
        if here.stream is not None and before is not None and before.stream not in (None, here.stream):
            here.stream.wait_stream(before.stream)
        return True
