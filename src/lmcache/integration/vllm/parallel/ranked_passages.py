"""Passages of a prompt that every rank holds, as the scheduler sees them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

from lmcache.blend.find_passages import FoundPassages, PromptCutter, Range
from lmcache.blend.passage_lease import HeldPassage, runs_of
from lmcache.integration.vllm.parallel.messages import (
    FindPassages,
    HoldPassages,
    LookAtPassages,
    Match,
    Matches,
    PassagesState,
    Release,
)
from lmcache.integration.vllm.parallel.ranks import Ranks
from lmcache.keys import Namespace, Tokens, token_bytes
from lmcache.storage.inquiry import Inquiry


class _Piece(NamedTuple):
    start: int
    end: int
    old_start: int
    tier: str


class RankedPassageLease:
    """Stands for one :class:`lmcache.blend.passage_lease.PassageLease` in every rank, under the same name.

    A piece counts when all ranks hold it: they blend the same tokens with the KV of the same chunks, or none.
    """

    def __init__(
        self, ranks: Ranks, name: str, matches: Sequence[Match], states: Sequence[PassagesState] | None
    ) -> None:
        """``states``: what the ranks answered when they were told to hold ``matches``; None for nothing."""
        self.name = name
        self._ranks = ranks
        self._matches = matches
        self._states: Sequence[PassagesState] = states or ()

    def ready(self) -> bool:
        if not self._all_ready():
            self._ask(cut=False)
        return self._all_ready()

    def cut(self) -> None:
        if not self._all_ready():
            self._ask(cut=True)

    def passages(self, start: int, end: int, min_tokens: int = 1, *, exact_tokens: int = 0) -> list[HeldPassage]:
        """See :meth:`lmcache.blend.passage_lease.PassageLease.passages`; without the KV itself."""
        runs = runs_of(self._pieces(), lambda piece: bool(piece.tier), start, end, min_tokens, exact_tokens)
        return [HeldPassage.of_tiers(run, (), (piece.tier for piece in run.pieces)) for run in runs]

    def release(self) -> None:
        """Idempotent."""
        if self._states:
            self._states = ()
            self._ranks.tell(Release(self.name))

    def _pieces(self) -> list[list[_Piece]]:
        """With the tier of the first rank, if all ranks hold the piece."""
        if not self._states:
            return []
        found = []
        for number, match in enumerate(self._matches):
            tiers = [state.tiers[number] for state in self._states]
            found.append(
                [
                    _Piece(
                        piece.start,
                        piece.end,
                        match.old_start + piece.start - match.start,
                        said[0] if all(said) else "",
                    )
                    for piece, *said in zip(match.pieces, *tiers, strict=True)
                ]
            )
        return found

    def _all_ready(self) -> bool:
        return all(state.ready for state in self._states)

    def _ask(self, *, cut: bool) -> None:
        self._states = self._ranks.ask(LookAtPassages(self.name, cut), PassagesState) or ()


class RankedFinder:
    """A :class:`lmcache.blend.find_passages.PassageFinder` over all ranks: the first one finds, all of them hold."""

    def __init__(self, ranks: Ranks, cutter: PromptCutter) -> None:
        self._ranks = ranks
        self._cutter = cutter
        self._lease_numbers = count()

    def ranges(self, tokens: Sequence[int], segments: Any) -> list[Range] | None:
        return self._cutter.ranges(tokens, segments)

    def ask(self, tokens: Tokens, start: int, ranges: list[Range] | None, namespace: Namespace) -> Inquiry:
        """Over at once: the first rank asks in :meth:`find`."""
        return Inquiry()

    def find(
        self, tokens: Tokens, start: int, ranges: list[Range] | None, namespace: Namespace
    ) -> FoundPassages[RankedPassageLease]:
        """Waits for the answers of the ranks, not for their disks."""
        name = f"passages-{next(self._lease_numbers)}"
        lora, salt = namespace.lora, namespace.cache_salt
        matches: tuple[Match, ...] = ()
        if ranges != []:
            found = self._ranks.ask_first(FindPassages(token_bytes(tokens), start, ranges, lora, salt), Matches)
            matches = () if found is None else found.matches
        states = self._ranks.ask(HoldPassages(name, matches, lora, salt), PassagesState) if matches else None
        return FoundPassages(RankedPassageLease(self._ranks, name, matches, states), ranges)
