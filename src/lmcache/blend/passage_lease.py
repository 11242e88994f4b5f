"""``PassageLease``: the passages of a prompt that were found in the cache, held until the request is done with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, Protocol, TypeVar

from lmcache.blend.chunk_source import ChunkPart
from lmcache.keys import CacheKey
from lmcache.memory.memory_obj import KVSpec, MemoryObj
from lmcache.segmentation.passage_index import PassageMatch
from lmcache.storage.kv_storage import KVStorage


class PassagePiece(Protocol):
    """Tokens ``[start, end)`` of a prompt, which stood at ``old_start`` in an earlier one."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def old_start(self) -> int: ...


PieceT = TypeVar("PieceT", bound=PassagePiece)


@dataclass(frozen=True)
class Run(Generic[PieceT]):
    """Consecutive ``pieces`` of match number ``match``, cut to the tokens ``[start, end)``."""

    match: int
    pieces: list[PieceT]
    start: int
    end: int
    old_start: int


def runs_of(
    matches: Iterable[Sequence[PieceT]],
    held: Callable[[PieceT], bool],
    start: int,
    end: int,
    min_tokens: int,
    exact_tokens: int,
) -> Iterator[Run[PieceT]]:
    """What is ``held`` of the tokens ``[start, end)``; see :meth:`PassageLease.passages`."""
    for match, pieces in enumerate(matches):
        run: list[PieceT] = []
        for piece in [*pieces, None]:
            if piece is not None and held(piece) and piece.end > start and piece.start < end:
                run.append(piece)
            elif run:
                found = _cut(match, run, start, end)
                continues = found.start == found.old_start == exact_tokens
                if found.end - (0 if continues else found.start) >= min_tokens:
                    yield found
                run = []


def _cut(match: int, pieces: list[PieceT], start: int, end: int) -> Run[PieceT]:
    first = max(pieces[0].start, start)
    return Run(match, pieces, first, min(pieces[-1].end, end), pieces[0].old_start + first - pieces[0].start)


@dataclass(slots=True)
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
    """Tokens ``[start, end)`` of the prompt, whose keys were rotated to positions ``old_start …``.

    ``match`` is the number of the match that they lie in. ``parts`` is empty where the KV is in other processes.
    """

    start: int
    end: int
    old_start: int
    parts: tuple[ChunkPart, ...]
    tokens_by_tier: dict[str, int] = field(default_factory=dict)
    match: int = 0

    @classmethod
    def of_tiers(cls, run: Run[PieceT], parts: tuple[ChunkPart, ...], tiers: Iterable[str]) -> HeldPassage:
        """``tiers``: where each piece of ``run`` came from."""
        tokens: dict[str, int] = {}
        for piece, tier in zip(run.pieces, tiers, strict=True):
            tokens[tier] = tokens.get(tier, 0) + min(piece.end, run.end) - max(piece.start, run.start)
        return cls(run.start, run.end, run.old_start, parts, tokens, run.match)


class PassageHold(Protocol):
    """A lease of passages, here or in other processes."""

    def ready(self) -> bool: ...

    def cut(self) -> None: ...

    def passages(self, start: int, end: int, min_tokens: int = 1, *, exact_tokens: int = 0) -> list[HeldPassage]: ...

    def release(self) -> None: ...


class PassageLease:
    """Pieces of passages, each either held in host memory or being read into it.

    What cannot be read leaves a hole; the pieces around it stay. Thread-safe.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passages: list[list[_Piece]] = []
        self._reading = 0  # pieces
        self._released = False

    @classmethod
    def take(
        cls, storage: KVStorage, matches: Iterable[PassageMatch[CacheKey]], spec: Callable[[int], KVSpec]
    ) -> PassageLease:
        """Hold what is there of ``matches`` and start the reads of what lies in slower tiers. Never blocks.

        Args:
            spec: what a chunk of so many tokens must look like; one that looks otherwise is a miss.
        """
        lease = cls()
        reads: list[tuple[_Piece, Future[MemoryObj | None]]] = []
        matches = list(matches)
        keys = [piece.key for match in matches for piece in match.pieces]
        hits = iter(storage.acquire_each(keys) if keys else ())
        for match in matches:
            pieces: list[_Piece] = []
            for piece in match.pieces:
                old_start = match.old_start + piece.start - match.start
                held = _Piece(piece.start, piece.end, old_start, piece.offset, tier="")
                pieces.append(held)
                if (found := next(hits)) is None:
                    held.arrived = True
                    continue
                held.tier = found.tier.name
                if found.read is not None:
                    reads.append((held, found.read))
                    continue
                held.arrived = True
                if found.obj is not None:
                    if _fits(found.obj, held, spec):
                        held.obj = found.obj
                    else:
                        found.obj.ref_down()
            lease._passages.append(pieces)
        lease._reading = len(reads)
        for held, read in reads:
            read.add_done_callback(partial(lease._read_ended, held, spec))
        return lease

    def ready(self) -> bool:
        """Whether no read is under way any more."""
        with self._changed:
            return self._is_ready()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`ready`; False when ``timeout`` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(self._is_ready, timeout)

    def cut(self) -> None:
        """Be content with what has arrived."""
        with self._changed:
            for piece in self._pieces() if self._reading else ():
                piece.arrived = True
            self._reading = 0
            self._changed.notify_all()

    def passages(self, start: int, end: int, min_tokens: int = 1, *, exact_tokens: int = 0) -> list[HeldPassage]:
        """What has arrived of the tokens ``[start, end)``, in runs of at least ``min_tokens``. Call :meth:`cut` first:
        what arrives later is not in it.

        A run counts the ``exact_tokens`` at the beginning of the prompt that it goes on from.
        """
        with self._changed:
            runs = runs_of(self._passages, _is_held, start, end, min_tokens, exact_tokens)
            return [_joined(run) for run in runs]

    def chosen(self, match: int, start: int, end: int) -> HeldPassage:
        """The tokens ``[start, end)`` of match number ``match``.

        Raises:
            ValueError: not all of them are held.
        """
        with self._changed:
            pieces = self._passages[match] if match < len(self._passages) else []
            for run in runs_of([pieces], _is_held, start, end, end - start, 0):
                return _joined(replace(run, match=match))
        raise ValueError(f"tokens [{start}, {end}) of match {match} are not held")

    def tiers(self) -> list[list[str]]:
        """For each piece of each match the tier it came from; empty for one that has not arrived."""
        with self._changed:
            return [[piece.tier if _is_held(piece) else "" for piece in pieces] for pieces in self._passages]

    def release(self) -> None:
        """Give every reference back, those of reads still under way when they arrive. Idempotent, never blocks."""
        with self._changed:
            self._released = True
            held = [piece.obj for piece in self._pieces() if piece.obj is not None]
            self._passages = []
            self._changed.notify_all()
        for obj in held:
            obj.ref_down()

    def _is_ready(self) -> bool:
        return self._released or not self._reading

    def _pieces(self) -> Iterable[_Piece]:
        return (piece for pieces in self._passages for piece in pieces)

    def _read_ended(self, piece: _Piece, spec: Callable[[int], KVSpec], read: Future[MemoryObj | None]) -> None:
        self._arrive(piece, spec, read.result())

    def _arrive(self, piece: _Piece, spec: Callable[[int], KVSpec], obj: MemoryObj | None) -> None:
        with self._changed:
            if not piece.arrived:
                if obj is not None and not self._released and _fits(obj, piece, spec):
                    piece.obj, obj = obj, None
                piece.arrived = True
                self._reading -= 1
            self._changed.notify_all()
        if obj is not None:
            obj.ref_down()


def _fits(obj: MemoryObj, piece: _Piece, spec: Callable[[int], KVSpec]) -> bool:
    num_tokens, wanted = obj.spec.num_tokens, spec(obj.spec.num_tokens)
    return piece.offset + piece.end - piece.start <= num_tokens and (obj.spec is wanted or obj.spec == wanted)


def _is_held(piece: _Piece) -> bool:
    return piece.obj is not None


def _joined(run: Run[_Piece]) -> HeldPassage:
    """Consecutive pieces as one passage."""
    parts: list[ChunkPart] = []
    for piece in run.pieces:
        first, last = max(piece.start, run.start), min(piece.end, run.end)
        assert piece.obj is not None
        parts.append(ChunkPart(piece.obj, piece.offset + first - piece.start, last - first))
    return HeldPassage.of_tiers(run, tuple(parts), (piece.tier for piece in run.pieces))
