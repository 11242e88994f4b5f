"""``KnownPassages``: every text that the cache holds KV of, to be found in any prompt, also after a restart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache.keys import CacheKey
from lmcache.observability.logging import init_logger, log_limited
from lmcache.segmentation.anchors import WINDOW
from lmcache.segmentation.new_chunk import NewChunk
from lmcache.segmentation.passage_catalog import PassageCatalog
from lmcache.segmentation.passage_index import PassageIndex, PassageMatch, Piece, run_length
from lmcache.segmentation.passage_row import PassageRow

logger = init_logger(__name__)

_MIN_SWEEP = 1024
_LOADED_AT_ONCE = 64


class KnownChunk(NamedTuple):
    """A chunk of which the cache holds the KV: its ``tokens``, and the position of the first in its prompt."""

    key: CacheKey
    tokens: npt.NDArray[np.uint32]
    start: int


class KnownPassages:
    """A :class:`PassageIndex` that follows what the cache evicts and, with a catalog, outlives the process.

    A fault of the catalog's medium is logged, and costs what was known before a restart. Thread-safe.
    """

    def __init__(
        self,
        chunk_size: int,
        alive: Callable[[CacheKey], bool],
        catalog: PassageCatalog | None = None,
        *,
        alive_each: Callable[[Sequence[CacheKey]], Sequence[bool]] | None = None,
        loaded: bool = True,
    ) -> None:
        """Takes over ``catalog``, and reads it in the background; ``loaded`` is set when that is done.

        Args:
            alive: whether the cache still holds a key; takes microseconds at most.
            alive_each: the same for many at once, where that is quicker.
            loaded: False if somebody else will set :attr:`loaded`.
        """
        self._index: PassageIndex[CacheKey] = PassageIndex(max(chunk_size, WINDOW))
        self._alive = alive
        self._alive_each = alive_each or (lambda keys: [alive(key) for key in keys])
        self._catalog = catalog
        self._lock = threading.Lock()
        self._added = 0
        self._closed = False
        self.publish: Callable[[Sequence[PassageRow]], None] | None = None
        """Tells others of consecutive chunks. Never blocks."""
        self.loaded = threading.Event()
        if catalog is None:
            if loaded:
                self.loaded.set()
        else:
            self._loading = threading.Thread(target=self._load, name="lmcache-passages", daemon=True)
            self._loading.start()

    def __len__(self) -> int:
        return len(self._index)

    def add_prompt(
        self, chunks: Sequence[KnownChunk], seams: Sequence[int] = (), *, before: CacheKey | None = None
    ) -> None:
        """Note consecutive chunks of one prompt, all of one namespace.

        Args:
            seams: positions of that prompt at which passages are known to begin.
            before: the chunk in front of the first, if it is known too.
        """
        rows: list[PassageRow] = []
        for chunk in chunks:
            inside = {seam - chunk.start for seam in seams if 0 <= seam - chunk.start < len(chunk.tokens)}
            # The start of every chunk counts too: a prompt is searched from where its exact prefix ends, which is such
            # a start, and a seam too close to the end of its chunk for a window is found by the start of the next.
            row = PassageRow(chunk.key, chunk.tokens, chunk.start, before, tuple(sorted(inside | {0})))
            rows.append(row)
            before = chunk.key
        noted = self._note(rows)
        if self._catalog is not None:
            for row in noted:
                self._catalog.put(row)
        if rows and self.publish is not None:
            self.publish(rows)
        self._sweep_if_due()

    def learn(self, rows: Iterable[PassageRow]) -> None:
        """Note chunks that others have published. A row that cannot be ours (its chunk is too long) is left out."""
        self._note([row for row in rows if len(row.tokens) <= self._index.chunk_size and row.start >= 0])
        self._sweep_if_due()

    def find(
        self,
        tokens: npt.NDArray[np.uint32],
        namespace: bytes,
        min_tokens: int = WINDOW,
        seams: Sequence[int] = (),
        exact_tokens: int = 0,
    ) -> list[PassageMatch[CacheKey]]:
        """What of ``tokens`` the cache holds, in runs of at least ``min_tokens``; see :meth:`PassageIndex.find`.

        Their beginning counts as a seam.
        """
        matches = self._index.find(
            tokens, min_tokens, namespace=namespace, seams=(0, *seams), exact_tokens=exact_tokens
        )
        living = iter(self._alive_each([piece.key for match in matches for piece in match.pieces]))
        return [
            run
            for match in matches
            for run in self._living(match, list(islice(living, len(match.pieces))))
            if run_length(run, exact_tokens) >= min_tokens
        ]

    def clear(self) -> None:
        """Forget what the cache has forgotten."""
        self._sweep()

    def close(self) -> None:
        """Write what is queued. Idempotent."""
        self._closed = True
        if self._catalog is not None:
            self._loading.join()
            self._catalog.close()

    def _note(self, rows: Sequence[PassageRow]) -> list[PassageRow]:
        """Those that are new."""
        noted = self._index.add(
            [
                NewChunk(row.key, row.tokens, row.start, row.before, row.key.namespace_id, row.seams)
                for row in rows
                if row.key not in self._index and len(row.tokens) >= WINDOW
            ]
        )
        with self._lock:
            self._added += len(noted)
        keys = {chunk.key for chunk in noted}
        return [row for row in rows if row.key in keys]

    def _discard(self, key: CacheKey) -> None:
        self._index.discard(key)
        if self._catalog is not None:
            self._catalog.remove(key)

    def _living(self, match: PassageMatch[CacheKey], living: list[bool]) -> Iterator[PassageMatch[CacheKey]]:
        """The parts of ``match`` between chunks that were evicted; ``living`` says which were not."""
        run: list[Piece[CacheKey]] = []
        if living and all(living):
            yield match
            return
        alive = iter(living)
        for piece in [*match.pieces, None]:
            if piece is not None and next(alive):
                run.append(piece)
                continue
            if piece is not None:
                self._discard(piece.key)
            if run:
                old_start = match.old_start + run[0].start - match.start
                yield PassageMatch(run[0].start, run[-1].end, old_start, tuple(run))
                run = []

    def _sweep_if_due(self) -> None:
        with self._lock:
            due = self._added > max(_MIN_SWEEP, len(self._index) // 2)
        if due:
            self._sweep()

    def _sweep(self) -> None:
        with self._lock:
            self._added = 0
        keys = list(self._index.keys())
        for key, alive in zip(keys, self._alive_each(keys), strict=True):
            if not alive:
                self._discard(key)

    def _load(self) -> None:
        assert self._catalog is not None
        living: list[PassageRow] = []
        try:
            try:
                for row in self._catalog.rows():
                    if self._closed:
                        return
                    if not self._alive(row.key):
                        self._catalog.remove(row.key)
                        continue
                    living.append(row)
                    if len(living) == _LOADED_AT_ONCE:
                        self._note(living)
                        living = []
            finally:  # also what was read before a failure
                self._note(living)
        except Exception as error:
            log_limited(
                logger, logging.ERROR, "passages:load", "passages of an earlier run are not found again: %r", error
            )
        finally:
            self.loaded.set()
