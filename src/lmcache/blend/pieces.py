"""The rows of a forward, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch

from lmcache.blend.attention import QueryMask
from lmcache.blend.batch import BlendBatch
from lmcache.blend.correctors.interface import Memo
from lmcache.memory.to_device import to_device

_numbers = count()


class Part(NamedTuple):
    """The rows of one prompt in a forward: ``queries`` counts the forward's rows, ``keys`` the batch's."""

    queries: slice
    keys: slice


class Piece:
    """The rows of one call of the host.

    ``rows`` (int64 ``[n]``) ascend; ``covers`` is the half-open range of the batch's rows whose KV is final with it,
    ``last`` whether it is the last of its forward. ``memo`` is what a corrector keeps for them from layer to layer.
    No two pieces have one ``number``: whoever keeps that does not keep a whole blend.
    """

    def __init__(
        self, batch: BlendBatch, rows: torch.Tensor, known: torch.Tensor, covers: tuple[int, int], last: bool
    ) -> None:
        """``known``: bool ``[N]``, the rows that may be looked at."""
        self.rows = rows
        self.covers = covers
        self.last = last
        self.number = next(_numbers)
        self.positions = batch.positions[rows]
        edges = torch.searchsorted(rows, torch.tensor([*(start for start, _ in batch.prompts), batch.num_rows]))
        at = edges.tolist()
        self.parts = [
            Part(slice(at[index], at[index + 1]), slice(*prompt))
            for index, prompt in enumerate(batch.prompts)
            if at[index] < at[index + 1]
        ]
        self.memo: Memo = {}
        self._known = known
        self._masks: dict[int | None, list[QueryMask]] = {}

    def mask(self, part: Part, queries: slice, sliding_window: int | None, device: torch.device) -> QueryMask:
        """For some of the piece's rows, of one prompt."""
        known = self._known[part.keys]
        positions = self.positions[queries]
        some = None if bool(known.all()) else to_device(known, device)
        return QueryMask(to_device(positions, device), sliding_window, some, on_host=positions)

    def masks(self, sliding_window: int | None, device: torch.device) -> list[QueryMask]:
        """One a part, made once a window."""
        if sliding_window not in self._masks:
            self._masks[sliding_window] = [self.mask(part, part.queries, sliding_window, device) for part in self.parts]
        return self._masks[sliding_window]


def cut_rows(rows: torch.Tensor, edges: Sequence[int], max_rows: int | None) -> Iterator[tuple[int, int]]:
    """Half-open ranges of ``rows`` of at most ``max_rows`` each, cut at one of ``edges`` (rows of the batch at which
    prompts and passages begin, ascending) where that leaves a piece at least half as large as it may be."""
    if max_rows is None or len(rows) <= max_rows:
        yield 0, len(rows)
        return
    at_edges = torch.searchsorted(rows, torch.tensor(list(edges), dtype=rows.dtype)).tolist()
    start = 0
    while len(rows) - start > max_rows:
        good = [edge for edge in at_edges if start + max_rows / 2 <= edge <= start + max_rows and edge > start]
        end = max(good, default=start + max_rows)
        yield start, end
        start = end
    yield start, len(rows)
