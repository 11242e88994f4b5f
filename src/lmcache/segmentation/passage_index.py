"""Finds tokens again that stood in any earlier prompt, wherever they stand now and however these were cut."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from lmcache.segmentation.anchor_table import AnchorTable
from lmcache.segmentation.anchors import WINDOW, anchors, anchors_of_each
from lmcache.segmentation.new_chunk import NewChunk

KeyT = TypeVar("KeyT", bound=Hashable)

_BLOCK_CHUNKS = 256
# A chunk that many others followed (the end of a system prompt, say) is not worth trying all: those have anchors too.
_MAX_CHILDREN = 16
# Of chunks: for a millisecond at most nobody can look anything up.
_MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Piece(Generic[KeyT]):
    """Tokens ``[start, end)`` of a prompt are the tokens of chunk ``key`` from its token ``offset`` on."""

    start: int
    end: int
    key: KeyT
    offset: int


@dataclass(frozen=True)
class PassageMatch(Generic[KeyT]):
    """Tokens ``[start, end)`` of a prompt stood together in an earlier one; ``pieces`` are the chunks they lie in.

    ``old_start`` is where the first of them stood then.
    """

    start: int
    end: int
    old_start: int
    pieces: tuple[Piece[KeyT], ...]


class _Prompt:
    """Tokens that are compared with those of many chunks."""

    def __init__(self, tokens: npt.NDArray[np.uint32]) -> None:
        self._tokens = tokens.astype(np.uint32, copy=False)
        self._bytes = self._tokens.tobytes()

    def __len__(self) -> int:
        return len(self._tokens)

    def differences(self, position: int, others: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64] | None:
        """Which of the tokens from ``position`` on are not those of ``others``, none of which lies behind the last;
        None: there are no such."""
        end = position + len(others)
        # Nearly always they are; to compare bytes takes a third of the time.
        if self._bytes[4 * position : 4 * end] == others.tobytes():
            return None
        return np.flatnonzero(self._tokens[position:end] != others)


class PassageIndex(Generic[KeyT]):
    """The tokens of the chunks that are kept, linked to what stood before and behind them.

    A prompt is searched for the anchors of all chunks; from an anchor, a match grows to both sides token by token, over
    the borders of chunks, so it ends exactly where the texts part. Every token of a match was compared. About
    ``5 · chunk_size + 400`` bytes of host memory a chunk. Thread-safe.

    Chunks of different namespaces (tenants, adapters) never meet. A *seam* is a place where a passage is known to
    begin: the window there is an anchor whatever its hash, so that short passages are found for certain.
    """

    def __init__(self, chunk_size: int) -> None:
        """``chunk_size``: tokens of a chunk, at least :data:`~lmcache.segmentation.anchors.WINDOW`."""
        if chunk_size < WINDOW:
            raise ValueError(f"chunk_size={chunk_size}: passages are found by windows of {WINDOW} tokens")
        self.chunk_size = chunk_size
        self._writing = threading.Lock()
        self._lock = threading.Lock()
        self._table = AnchorTable()
        self._blocks: list[npt.NDArray[np.uint32]] = []
        self._ids: dict[KeyT, int] = {}
        self._keys: list[KeyT | None] = []
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._namespaces: list[bytes] = []
        self._before: list[int] = []
        self._behind: defaultdict[int, list[int]] = defaultdict(list)
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, key: KeyT) -> bool:
        return key in self._ids

    def keys(self) -> list[KeyT]:
        """A snapshot."""
        with self._lock:
            return list(self._ids)

    def add(self, chunks: Sequence[NewChunk[KeyT]]) -> list[NewChunk[KeyT]]:
        """Note ``chunks``, one after the other; returns those that were not there. One too short for a window is not
        noted.

        Raises:
            ValueError: a chunk has more than ``chunk_size`` tokens.
        """
        for chunk in chunks:
            if len(chunk.tokens) > self.chunk_size:
                raise ValueError(f"a chunk has at most {self.chunk_size} tokens, got {len(chunk.tokens)}")
        new = [chunk for chunk in chunks if len(chunk.tokens) >= WINDOW and chunk.key not in self._ids]
        noted: list[NewChunk[KeyT]] = []
        for first in range(0, len(new), _MOST_AT_ONCE):
            noted += self._add(new[first : first + _MOST_AT_ONCE])
        return noted

    def _add(self, chunks: Sequence[NewChunk[KeyT]]) -> list[NewChunk[KeyT]]:
        # All at once: numpy takes as long to begin as for the anchors of a chunk.
        of, at, hashes = anchors_of_each([chunk.tokens for chunk in chunks], [chunk.seams for chunk in chunks])
        hashes ^= np.fromiter((_salt(chunk.namespace) for chunk in chunks), np.uint64, len(chunks))[of]
        # Growing takes seconds when there are millions; only other writers wait for that.
        with self._writing:
            if self._table.full(len(at)):
                self._table = self._table.successor(lambda places: self._alive()[places // self.chunk_size], len(at))
            with self._lock:
                ids = [-1 if chunk.key in self._ids else self._note(chunk) for chunk in chunks]
                places = np.array(ids, np.int64)[of] * self.chunk_size + at
                if min(ids) < 0:  # another thread was quicker, or one was named twice
                    hashes, places = hashes[places >= 0], places[places >= 0]
                self._table.put(hashes, places)
        return [chunk for chunk, number in zip(chunks, ids, strict=True) if number >= 0]

    def _note(self, chunk: NewChunk[KeyT]) -> int:
        """The chunk without its anchors; its number."""
        before, namespace = chunk.before, chunk.namespace
        number, length = self._new_id(), len(chunk.tokens)
        self._ids[chunk.key] = number
        self._keys[number], self._starts[number], self._lengths[number] = chunk.key, chunk.start, length
        self._block(number)[:length] = chunk.tokens
        parent = self._ids.get(before, -1) if before is not None else -1
        if parent >= 0 and self._namespaces[parent] != namespace:
            parent = -1
        self._before[number] = parent
        if parent >= 0:
            self._behind[parent].append(number)
            namespace = self._namespaces[parent]  # one object for all chunks of a prompt
        self._namespaces[number] = namespace
        return number

    def discard(self, key: KeyT) -> None:
        """Forget a chunk; unknown ones are ignored."""
        with self._writing, self._lock:
            chunk = self._ids.pop(key, None)
            if chunk is None:
                return
            self._keys[chunk] = None
            for child in self._behind.pop(chunk, ()):
                self._before[child] = -1
            if self._before[chunk] >= 0:
                self._behind[self._before[chunk]].remove(chunk)
            self._free.append(chunk)

    def find(
        self,
        tokens: npt.NDArray[np.uint32],
        min_tokens: int = WINDOW,
        *,
        namespace: bytes = b"",
        seams: Collection[int] = (),
        exact_tokens: int = 0,
    ) -> list[PassageMatch[KeyT]]:
        """What of ``tokens`` stood in earlier prompts, in runs of at least ``min_tokens``, by where they begin.

        Matches may overlap, where a text stood in several places and each goes on in another way.

        Args:
            seams: where passages are known to begin. One that was noted so is found if it has two windows.
            exact_tokens: how many tokens stand before ``tokens`` whose KV is there; see :func:`run_length`.
        """
        # Where a seam had no whole window left in its chunk, the next chunk's start took its place.
        at, hashes = anchors(tokens, [place for seam in seams for place in range(seam, seam + WINDOW)])
        hashes ^= _salt(namespace)
        prompt = _Prompt(tokens)
        matches: list[PassageMatch[KeyT]] = []
        with self._lock:
            places = self._table.get(hashes)
            known = places >= 0
            covered = 0
            for position, place in zip(at[known].tolist(), places[known].tolist(), strict=True):
                if position + WINDOW <= covered:
                    continue
                chunk, offset = divmod(place, self.chunk_size)
                if self._namespaces[chunk] != namespace:
                    continue
                pieces = self._grown(prompt, position, chunk, offset)
                if not pieces:
                    continue
                covered = max(covered, pieces[-1].end)
                first = pieces[0]
                old_start = self._starts[self._ids[first.key]] + first.offset
                match = PassageMatch(first.start, pieces[-1].end, old_start, tuple(pieces))
                if run_length(match, exact_tokens) >= min_tokens:
                    matches.append(match)
        matches.sort(key=lambda match: match.start)
        return matches

    def _grown(self, tokens: _Prompt, position: int, chunk: int, offset: int) -> list[Piece[KeyT]]:
        """The match around an anchor at ``position``, which is said to be at ``offset`` of ``chunk``; empty if not."""
        if self._keys[chunk] is None or (same := self._common(tokens, position, chunk, offset)) < WINDOW:
            return []
        left = self._leftwards(tokens, position, chunk, offset)
        right = self._rightwards(tokens, position, chunk, offset, same)
        if left and left[-1].key == right[0].key:
            first = left.pop()
            right[0] = Piece(first.start, right[0].end, first.key, first.offset)
        return left + right

    def _leftwards(self, tokens: _Prompt, position: int, chunk: int, offset: int) -> list[Piece[KeyT]]:
        """Pieces that end at ``position``, where ``offset`` of ``chunk`` is; the last is of ``chunk`` itself."""
        pieces: list[Piece[KeyT]] = []
        while chunk >= 0:
            length = min(position, offset)
            differs = tokens.differences(position - length, self._block(chunk)[offset - length : offset])
            same = length if differs is None else length - 1 - int(differs[-1])
            self._piece(pieces, position - same, position, chunk, offset - same)
            if same < offset:
                break
            position -= same
            chunk = self._before[chunk]
            offset = self._lengths[chunk] if chunk >= 0 else 0
        return pieces[::-1]

    def _rightwards(self, tokens: _Prompt, position: int, chunk: int, offset: int, same: int) -> list[Piece[KeyT]]:
        """Pieces that begin at ``position``, where ``offset`` of ``chunk`` is, and ``same`` tokens are its tokens."""
        pieces: list[Piece[KeyT]] = []
        while same:
            self._piece(pieces, position, position + same, chunk, offset)
            if offset + same < self._lengths[chunk]:
                break
            position += same
            offset = 0
            children = self._behind.get(chunk, ())
            if len(children) == 1:
                chunk = children[0]
                same = self._common(tokens, position, chunk, 0)
                continue
            matches = [(self._common(tokens, position, child, 0), child) for child in children[-_MAX_CHILDREN:]]
            same, chunk = max(matches, default=(0, -1))
        return pieces

    def _common(self, tokens: _Prompt, position: int, chunk: int, offset: int) -> int:
        """How many tokens from ``position`` on are those of ``chunk`` from ``offset`` on."""
        length = max(0, min(len(tokens) - position, self._lengths[chunk] - offset))
        differs = tokens.differences(position, self._block(chunk)[offset : offset + length])
        return length if differs is None else int(differs[0])

    def _piece(self, pieces: list[Piece[KeyT]], start: int, end: int, chunk: int, offset: int) -> None:
        key = self._keys[chunk]
        if start < end and key is not None:
            pieces.append(Piece(start, end, key, offset))

    def _alive(self) -> npt.NDArray[np.bool_]:
        return np.fromiter((key is not None for key in self._keys), bool, len(self._keys))

    def _new_id(self) -> int:
        if self._free:
            return self._free.pop()
        chunk = len(self._keys)
        if chunk % _BLOCK_CHUNKS == 0:
            self._blocks.append(np.zeros((_BLOCK_CHUNKS, self.chunk_size), np.uint32))
        self._keys.append(None)
        self._starts.append(0)
        self._lengths.append(0)
        self._namespaces.append(b"")
        self._before.append(-1)
        return chunk

    def _block(self, chunk: int) -> npt.NDArray[np.uint32]:
        block, row = divmod(chunk, _BLOCK_CHUNKS)
        room: npt.NDArray[np.uint32] = self._blocks[block][row]
        return room


def run_length(match: PassageMatch[KeyT], exact_tokens: int) -> int:
    """Tokens of ``match``. One at the very beginning that stands where it stood goes on from the exact ones before it,
    and counts with them: the end of a passage, say, whose whole chunks are an exact prefix."""
    continues = match.start == 0 and match.old_start == exact_tokens
    return match.end - match.start + (exact_tokens if continues else 0)


@lru_cache(maxsize=256)
def _salt(namespace: bytes) -> np.uint64:
    """Keeps the anchors of namespaces apart, so that the common texts of many tenants do not crowd each other out."""
    salt: np.uint64 = np.uint64(int.from_bytes(blake3(namespace).digest(8), "little") if namespace else 0)
    return salt
