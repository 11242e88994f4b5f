"""``PrefixLease``: the part of a prompt that a request may reuse, held until it is done with it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import NamedTuple

from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.metadata import TOKEN_MAJOR
from lmcache.prompt import Chunk
from lmcache.storage.kv_storage import Found, KVStorage


class LeasedChunk(NamedTuple):
    """A chunk that was found, and what it must look like when it arrives."""

    chunk: Chunk
    spec: KVSpec
    found: Found


class PrefixLease:
    """Consecutive chunks, each either held in host memory or being read into it.

    A promise that can only shrink: a chunk that cannot be read takes all behind it along. Thread-safe. Usable as a
    context manager that releases it.
    """

    def __init__(self, hits: Sequence[LeasedChunk], *, layout: str = TOKEN_MAJOR, min_end: int = 0) -> None:
        """Takes over the references of ``hits``; see :meth:`take`.

        Args:
            layout: host layout of the chunks.
            min_end: a lease that ends before this token counts as empty.
        """
        self.layout = layout
        self._changed = threading.Condition()
        self._min_end = min_end
        self._released = False
        self._chunks = [hit.chunk for hit in hits]
        self._tiers = [hit.found.tier.name for hit in hits]
        self._objs: list[MemoryObj | None] = [None] * len(hits)
        self._promised = len(hits)
        self._arrived = 0
        dropped: list[MemoryObj | None] = []
        for index, (_, spec, found) in enumerate(hits):
            if found.read is None:
                dropped += self._take(index, spec, found.obj)
        for index, (_, spec, found) in enumerate(hits):
            if found.read is not None:
                found.read.add_done_callback(partial(self._read_ended, index, spec))
        with self._changed:
            dropped += self._shrink(self._promised)
        _give_back(dropped)

    @classmethod
    def take(
        cls,
        storage: KVStorage,
        chunks: Iterable[Chunk],
        spec: Callable[[int], KVSpec],
        *,
        layout: str,
        min_end: int = 0,
    ) -> PrefixLease:
        """Hold the leading hits among ``chunks`` and start the reads of those in slower tiers. Never blocks.

        Args:
            spec: what a chunk of so many tokens must look like; one that looks otherwise is a miss.
        """
        chunks = list(chunks)
        found = storage.acquire_leading([chunk.key for chunk in chunks]) if chunks else []
        hits = [LeasedChunk(chunk, spec(chunk.num_tokens), each) for chunk, each in zip(chunks, found, strict=False)]
        return cls(hits, layout=layout, min_end=min_end)

    @property
    def num_tokens(self) -> int:
        """Tokens from the start of the prompt up to the end of the lease; final once :meth:`ready`."""
        with self._changed:
            return self._chunks[self._promised - 1].end if self._promised else 0

    def tokens_by_tier(self, start: int = 0, end: int | None = None) -> dict[str, int]:
        """The leased tokens within ``[start, end)`` by the tier they came from: ``{"memory": 512, "disk": 256}``."""
        tokens: Counter[str] = Counter()
        with self._changed:
            for chunk, tier in zip(self._chunks[: self._promised], self._tiers, strict=False):
                last = chunk.end if end is None else min(chunk.end, end)
                tokens[tier] += max(0, last - max(chunk.start, start))
        return {tier: count for tier, count in tokens.items() if count}

    def tier_runs(self) -> list[tuple[str, int]]:
        """The leased tokens from the start of the prompt on, as runs of ``(tier, end of the run)``."""
        runs: list[tuple[str, int]] = []
        with self._changed:
            for chunk, tier in zip(self._chunks[: self._promised], self._tiers, strict=False):
                if runs and runs[-1][0] == tier:
                    runs.pop()
                runs.append((tier, chunk.end))
        return runs

    def ready(self) -> bool:
        """Whether every byte of the lease is in host memory."""
        with self._changed:
            return self._is_ready()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`ready`; False when ``timeout`` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(self._is_ready, timeout)

    def cut(self) -> None:
        """Be content with what has arrived: the lease is ready, and shorter if reads are still under way."""
        with self._changed:
            dropped = self._shrink(self._arrived)
            self._changed.notify_all()
        _give_back(dropped)

    @contextmanager
    def arrived(self, after: int, timeout: float | None = None) -> Iterator[list[tuple[Chunk, MemoryObj]]]:
        """The chunks that have arrived beyond the first ``after``, held until the block is left.

        Waits for at least one, ``timeout`` seconds at most; empty when there are no more, or none in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._arrived > after or self._is_ready(), timeout)
            # References of our own: another thread may release the lease while the bytes are being copied.
            held = (
                [] if self._released else [obj.ref_up() for obj in self._objs[after : self._arrived] if obj is not None]
            )
            chunks = self._chunks[after : after + len(held)]
        try:
            yield list(zip(chunks, held, strict=True))
        finally:
            _give_back(held)

    def release(self) -> None:
        """Give every reference back, those of reads still under way when they arrive. Idempotent, never blocks."""
        with self._changed:
            self._released = True
            dropped, self._objs = self._objs, []
            self._changed.notify_all()
        _give_back(dropped)

    def __enter__(self) -> PrefixLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self._released else "ready" if self.ready() else "reading"
        return f"PrefixLease({self.num_tokens} tokens, {state})"

    def _read_ended(self, index: int, spec: KVSpec, read: Future[MemoryObj | None]) -> None:
        self._arrive(index, spec, read.result())

    def _arrive(self, index: int, spec: KVSpec, obj: MemoryObj | None) -> None:
        with self._changed:
            dropped = self._take(index, spec, obj)
            self._changed.notify_all()
        _give_back(dropped)

    def _take(self, index: int, spec: KVSpec, obj: MemoryObj | None) -> list[MemoryObj | None]:
        """Keep what has arrived; gives the objects that are not needed any more."""
        if self._released or index >= self._promised:
            return [obj]
        if obj is None or (obj.spec is not spec and obj.spec != spec):
            return [obj, *self._shrink(index)]
        self._objs[index] = obj
        while self._arrived < self._promised and self._objs[self._arrived] is not None:
            self._arrived += 1
        return []

    def _is_ready(self) -> bool:
        return self._released or self._arrived >= self._promised

    def _shrink(self, promised: int) -> list[MemoryObj | None]:
        """Promise no more than ``promised`` chunks; gives the objects that are not needed any more."""
        if promised and self._chunks[promised - 1].end < self._min_end:
            promised = 0
        self._promised = promised
        self._arrived = min(self._arrived, promised)
        dropped = self._objs[promised:]
        self._objs[promised:] = [None] * len(dropped)
        return dropped


def _give_back(objs: Sequence[MemoryObj | None]) -> None:
    for obj in objs:
        if obj is not None:
            obj.ref_down()
