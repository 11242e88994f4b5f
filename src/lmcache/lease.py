"""What a request may reuse, kept alive until it has been copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType

from lmcache.memory.memory_obj import MemoryObj


@dataclass(frozen=True)
class LeasedChunk:
    """Tokens ``[start, end)`` of a prompt, on their way from ``tier`` into host memory."""

    start: int
    end: int
    tier: str
    future: Future[MemoryObj | None]


def _give_back(done: Future[MemoryObj | None]) -> None:
    if not done.cancelled() and (obj := done.result()) is not None:
        obj.ref_down()


class PrefixLease:
    """References to the leading chunks of a prompt, some of which may still be read from slower tiers.

    While reads are under way :attr:`num_tokens` is what was found in the indexes; once :meth:`ready`, it is what has
    really arrived, up to the first chunk that could not be read. Thread-safe; a context manager that releases.
    """

    def __init__(self, chunks: Sequence[LeasedChunk]) -> None:
        self._chunks = list(chunks)
        self._lock = threading.Lock()

    @property
    def num_tokens(self) -> int:
        with self._lock:
            self._drop_failed()
            return self._chunks[-1].end if self._chunks else 0

    def ready(self) -> bool:
        """Whether every read has ended: :attr:`num_tokens` is final and every byte lies in host memory."""
        with self._lock:
            self._drop_failed()
            return all(chunk.future.done() for chunk in self._chunks)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until :meth:`ready`, at most ``timeout`` seconds."""
        with self._lock:
            futures = [chunk.future for chunk in self._chunks if not chunk.future.done()]
        if futures:
            wait(futures, timeout)
        return self.ready()

    def cut(self) -> None:
        """Wait no longer: keep the leading chunks that have arrived."""
        with self._lock:
            self._drop_failed()
            self._keep(lambda chunk: chunk.future.done())

    def tokens_by_tier(self, first: int = 0) -> dict[str, int]:
        """How many of the tokens from ``first`` on come from each tier, in the order in which they are met."""
        tokens: dict[str, int] = {}
        with self._lock:
            self._drop_failed()
            for chunk in self._chunks:
                if chunk.end > first:
                    tokens[chunk.tier] = tokens.get(chunk.tier, 0) + chunk.end - max(chunk.start, first)
        return tokens

    def arrived(self) -> list[tuple[LeasedChunk, MemoryObj]]:
        """The chunks in order with their bytes, waiting for reads under way. Valid until :meth:`release`."""
        self.wait()
        with self._lock:
            return [(chunk, obj) for chunk in self._chunks if (obj := chunk.future.result()) is not None]

    def release(self) -> None:
        """Give every reference back, those of reads still under way when they end. Idempotent."""
        with self._lock:
            self._keep(lambda chunk: False)

    def _drop_failed(self) -> None:
        self._keep(lambda chunk: not chunk.future.done() or chunk.future.result() is not None)

    def _keep(self, wanted: Callable[[LeasedChunk], bool]) -> None:
        """Shrink to the leading chunks that are ``wanted``."""
        for index, chunk in enumerate(self._chunks):
            if not wanted(chunk):
                for dropped in self._chunks[index:]:
                    dropped.future.add_done_callback(_give_back)
                del self._chunks[index:]
                return

    def __enter__(self) -> PrefixLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
