"""A pool's pinned slabs, made one after the other in a thread of their own, so that the engine hardly feels it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter

import torch

from lmcache.memory.slab import Slab

PINNED_SLAB_BYTES = 64 << 20
"""While CUDA registers memory, no kernel is launched, so it is registered in pieces of a few milliseconds. An object
lies inside one: copies that span two registrations are refused, or not asynchronous."""

# So many times as long as a registration took the driver is left alone: an engine launches a kernel every few
# microseconds.
_REST = 3.0


class SlabGrowth:
    """Runs while there is a slab to make. Everything but :meth:`close` wants the pool's lock held."""

    def __init__(self, lock: threading.Lock, next_bytes: Callable[[int], int], attach: Callable[[Slab], None]) -> None:
        """Args:
        lock: the pool's.
        next_bytes: of a slab that has room for so many, the largest that anybody waits for (0: nobody does); 0 if
            there is to be none. Called with the lock held.
        attach: takes over a new slab. Called with the lock held.
        """
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._next_bytes = next_bytes
        self._attach = attach
        self._waiting: list[int] = []
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._error: Exception | None = None
        self.coming_bytes = 0
        """Of the slab that is being made."""

    def wake(self) -> None:
        """There may be something to make."""
        if self._thread is not None or self._closing.is_set():
            return
        self._error = None
        # A new thread would open a context on the first GPU, whichever is its caller's.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._run, args=(device,), name="lmcache-slabs", daemon=True)
        self._thread.start()

    def wait(self, nbytes: int) -> None:
        """Until there is another slab, which has room for ``nbytes`` if the pool has; the lock is let go meanwhile.

        Raises:
            OSError: there is no address space for it.
        """
        self._waiting.append(nbytes)
        try:
            self.wake()
            self._changed.wait()
        finally:
            self._waiting.remove(nbytes)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Make no more. Whoever waits looks again. Returns when the thread has ended. Idempotent."""
        self._closing.set()
        with self._lock:
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def _run(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)
        while nbytes := self._plan():
            try:
                slab = Slab(0, nbytes, pin=False)
                slab.fault_in()
                began = perf_counter()
                slab.pin()
                took = perf_counter() - began
            except Exception as error:
                self._failed(error)
                return
            with self._lock:
                self.coming_bytes = 0
                self._attach(slab)
                self._changed.notify_all()
            self._closing.wait(_REST * took)

    def _plan(self) -> int:
        with self._lock:
            self.coming_bytes = 0 if self._closing.is_set() else self._next_bytes(max(self._waiting, default=0))
            if not self.coming_bytes:
                self._thread = None
                self._changed.notify_all()
            return self.coming_bytes

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self._error, self._thread, self.coming_bytes = error, None, 0
            self._changed.notify_all()
