"""``PassageLease``: the passages of a prompt that were found in the cache, held until the request is done with them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from lmcache.blend.chunk_source import ChunkPart
from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.segmentation.passage_index import PassageMatch
from lmcache.storage.tiered import TieredStorage


@dataclass
class _Piece:
    """Tokens ``[start, end)`` of the prompt, which stood at ``old_start`` and are in a chunk from ``offset`` on."""

    start: int
    end: int
    old_start: int
    offset: int
    tier: str
    obj: MemoryObj | None = None
    arrived: bool = False


@dataclass(frozen=True)
class HeldPassage:
    """Tokens ``[start, end)`` of the prompt, whose keys were rotated to positions ``old_start …``."""

    start: int
    end: int
    old_start: int
    parts: tuple[ChunkPart, ...]
    tokens_by_tier: dict[str, int] = field(default_factory=dict)


class PassageLease:
    """Pieces of passages, each either held in host memory or being read into it.

    What cannot be read leaves a hole; the pieces around it stay. Thread-safe.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passages: list[list[_Piece]] = []
        self._released = False

    @classmethod
    def take(
        cls, storage: TieredStorage, matches: Iterable[PassageMatch[CacheKey]], spec: Callable[[int], KVSpec]
    ) -> PassageLease:
        """Hold what is there of ``matches`` and start the reads of what lies in slower tiers. Never blocks.

        Args:
            spec: what a chunk of so many tokens must look like; one that looks otherwise is a miss.
        """
        lease = cls()
        reads: list[tuple[_Piece, Future[MemoryObj | None]]] = []
        for match in matches:
            pieces: list[_Piece] = []
            for piece in match.pieces:
                old_start = match.old_start + piece.start - match.start
                held = _Piece(piece.start, piece.end, old_start, piece.offset, tier="")
                pieces.append(held)
                if (found := storage.acquire(piece.key)) is None:
                    held.arrived = True
                    continue
                held.tier = found.tier.name
                if found.read is None:
                    lease._arrive(held, spec, found.obj)
                else:
                    reads.append((held, found.read))
            lease._passages.append(pieces)
        for held, read in reads:
            read.add_done_callback(partial(lease._read_ended, held, spec))
        return lease

    def ready(self) -> bool:
        """Whether no read is under way any more."""
        with self._changed:
            return self._released or all(piece.arrived for piece in self._pieces())

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`ready`; False when ``timeout`` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._released or all(piece.arrived for piece in self._pieces()), timeout
            )

    def cut(self) -> None:
        """Be content with what has arrived."""
        with self._changed:
            for piece in self._pieces():
                piece.arrived = True

    def passages(self, start: int, end: int, min_tokens: int = 1, *, exact_tokens: int = 0) -> list[HeldPassage]:
        """What has arrived of the tokens ``[start, end)``, in runs of at least ``min_tokens``. Call :meth:`cut` first:
        what arrives later is not in it.

        A run counts the ``exact_tokens`` at the beginning of the prompt that it goes on from.
        """
        found: list[HeldPassage] = []
        with self._changed:
            for pieces in self._passages:
                run: list[_Piece] = []
                for piece in [*pieces, None]:
                    if piece is not None and piece.obj is not None and piece.end > start and piece.start < end:
                        run.append(piece)
                    elif run:
                        passage = _joined(run, start, end)
                        continues = passage.start == passage.old_start == exact_tokens
                        if passage.end - (0 if continues else passage.start) >= min_tokens:
                            found.append(passage)
                        run = []
        return found

    def release(self) -> None:
        """Give every reference back, those of reads still under way when they arrive. Idempotent, never blocks."""
        with self._changed:
            self._released = True
            held = [piece.obj for piece in self._pieces() if piece.obj is not None]
            self._passages = []
            self._changed.notify_all()
        for obj in held:
            obj.ref_down()

    def _pieces(self) -> Iterable[_Piece]:
        return (piece for pieces in self._passages for piece in pieces)

    def _read_ended(self, piece: _Piece, spec: Callable[[int], KVSpec], read: Future[MemoryObj | None]) -> None:
        self._arrive(piece, spec, read.result())

    def _arrive(self, piece: _Piece, spec: Callable[[int], KVSpec], obj: MemoryObj | None) -> None:
        with self._changed:
            if obj is not None and not self._released and not piece.arrived and _fits(obj, piece, spec):
                piece.obj, obj = obj, None
            piece.arrived = True
            self._changed.notify_all()
        if obj is not None:
            obj.ref_down()


def _fits(obj: MemoryObj, piece: _Piece, spec: Callable[[int], KVSpec]) -> bool:
    num_tokens = obj.spec.num_tokens
    return piece.offset + piece.end - piece.start <= num_tokens and obj.spec == spec(num_tokens)


def _joined(run: Sequence[_Piece], start: int, end: int) -> HeldPassage:
    """Consecutive pieces as one passage, without what lies outside of ``[start, end)``."""
    parts: list[ChunkPart] = []
    tiers: Counter[str] = Counter()
    for piece in run:
        first, last = max(piece.start, start), min(piece.end, end)
        assert piece.obj is not None
        parts.append(ChunkPart(piece.obj, piece.offset + first - piece.start, last - first))
        tiers[piece.tier] += last - first
    first = max(run[0].start, start)
    return HeldPassage(first, min(run[-1].end, end), run[0].old_start + first - run[0].start, tuple(parts), dict(tiers))
