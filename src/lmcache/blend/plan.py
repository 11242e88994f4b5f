"""What a blend does with one prompt, as data: what is reused from where, what is computed, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import torch

_Mask: TypeAlias = npt.NDArray[np.bool_]


class Reason(str, Enum):
    """Why a range of tokens is handled as it is."""

    EXACT = "reused as it is: the same tokens stand before it"
    MOVED = "reused, moved"
    NOT_CACHED = "computed: not cached"
    SUFFIX = "computed: end of the prompt"
    SELECTED = "computed: chosen by the policy"

    @property
    def computed(self) -> bool:
        return self in (Reason.NOT_CACHED, Reason.SUFFIX, Reason.SELECTED)


@dataclass(frozen=True)
class ReusedSpan:
    """Tokens ``[start, end)`` of a prompt whose KV is in a source.

    ``source`` counts the sources of the prompt; ``source_start`` is the source's token that stands at ``start``.
    ``old_start`` is the position at which that token's key was rotated. ``exact``: the same tokens stood before it
    when it was computed, at the same positions, so its KV is right as it is.
    """

    start: int
    end: int
    source: int
    source_start: int = 0
    old_start: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"tokens [{self.start}, {self.end}) of a prompt: must not be empty or negative")
        if min(self.source, self.source_start, self.old_start) < 0:
            raise ValueError(f"{self}: source, source_start and old_start must not be negative")
        if self.exact and self.old_start != self.start:
            raise ValueError(f"{self}: exact, but its keys are of position {self.old_start}, not {self.start}")

    def cut(self, start: int, end: int) -> ReusedSpan:
        """The part of it in ``[start, end)``."""
        skipped = start - self.start
        return replace(
            self, start=start, end=end, source_start=self.source_start + skipped, old_start=self.old_start + skipped
        )


class PlannedRange(msgspec.Struct, frozen=True):
    """Tokens ``[start, end)`` that have one fate. ``source`` and ``old_start`` only where KV is reused or replaced."""

    start: int
    end: int
    reason: Reason
    source: int | None = None
    old_start: int | None = None


@dataclass(frozen=True)
class BlendPlan:
    """``spans`` are ascending and do not overlap; exact ones come first, without a hole.

    The last ``suffix_tokens`` tokens are always computed. ``selected`` are ascending ranges of reused tokens that a
    policy chose; ``policy`` is its name. Before selection both are empty.
    """

    num_tokens: int
    spans: tuple[ReusedSpan, ...] = ()
    suffix_tokens: int = 1
    selected: tuple[tuple[int, int], ...] = ()
    policy: str = ""

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"a prompt has at least one token, got {self.num_tokens}")
        if not 1 <= self.suffix_tokens <= self.num_tokens:
            raise ValueError(f"suffix_tokens={self.suffix_tokens}: must be 1 … {self.num_tokens}")
        end = exact_end = 0
        for span in self.spans:
            if span.start < end or span.end > self.num_tokens:
                raise ValueError(f"{span}: overlaps the span before it, or ends beyond {self.num_tokens} tokens")
            if span.exact and span.start != exact_end:
                raise ValueError(f"{span}: exact, but the tokens before it are not")
            end = span.end
            exact_end = end if span.exact else exact_end

    @classmethod
    def of(
        cls, num_tokens: int, hits: Sequence[ReusedSpan] = (), *, suffix_tokens: int = 1, min_tokens: int = 1
    ) -> BlendPlan:
        """Plan from hits in any order, which may overlap.

        Exact hits win over others, then longer over shorter, then earlier over later; a loser keeps the tokens that
        no winner has, in pieces of at least ``min_tokens``.
        """
        ordered = sorted(hits, key=lambda span: span.start)
        if any(later.start < span.end for span, later in pairwise(ordered)):
            ordered = _apart(hits, min_tokens)
        spans: list[ReusedSpan] = []
        exact_end = 0
        for span in ordered:
            if span.exact and span.start == exact_end:
                exact_end = span.end
            elif span.exact:
                span = replace(span, exact=False)
            spans.append(span)
        return cls(num_tokens, tuple(spans), suffix_tokens)

    # As masks, for a pass

    def exact(self) -> torch.Tensor:
        """bool ``[num_tokens]``: reused as it is and not computed."""
        return torch.from_numpy(self._exact())

    def reusable(self) -> torch.Tensor:
        """bool ``[num_tokens]``: R, the tokens of moved spans, those at the forced end included."""
        return torch.from_numpy(self._mask(span for span in self.spans if not span.exact))

    def forced(self) -> torch.Tensor:
        """bool ``[num_tokens]``: S, the tokens that no policy may leave out."""
        return torch.from_numpy(self._forced())

    def moved_spans(self) -> tuple[ReusedSpan, ...]:
        return tuple(span for span in self.spans if not span.exact)

    # Once a policy has chosen

    def select(self, computed: torch.Tensor, policy: str) -> BlendPlan:
        """The plan with what ``policy`` chose: ``computed`` is bool ``[num_tokens]``, the forced tokens included."""
        forced, chosen = self._forced(), computed.numpy()
        if (forced & ~chosen).any():
            raise ValueError(f"policy {policy!r} left out tokens that must be computed")
        return replace(self, selected=_runs(chosen & ~forced & ~self._exact()), policy=policy)

    def ranges(self) -> list[PlannedRange]:
        """The whole prompt, in order, cut wherever fate or source changes."""
        fate = [Reason.NOT_CACHED] * self.num_tokens
        origin: list[tuple[int, int] | None] = [None] * self.num_tokens
        for span in self.spans:
            for token in range(span.start, span.end):
                fate[token] = Reason.EXACT if span.exact else Reason.MOVED
                origin[token] = span.source, span.old_start - span.start
        for start, end in self.selected:
            fate[start:end] = [Reason.SELECTED] * (end - start)
        for token in range(self.num_tokens - self.suffix_tokens, self.num_tokens):
            if fate[token] is not Reason.NOT_CACHED:
                fate[token] = Reason.SUFFIX
        ranges: list[PlannedRange] = []
        start = 0
        for end in range(1, self.num_tokens + 1):
            if end == self.num_tokens or (fate[end], origin[end]) != (fate[start], origin[start]):
                source, moved_by = origin[start] or (None, None)
                ranges.append(PlannedRange(start, end, fate[start], source, moved_by and start + moved_by))
                start = end
        return ranges

    def __str__(self) -> str:
        computed = sum(r.end - r.start for r in self.ranges() if r.reason.computed)
        lines = [f"{self.num_tokens} tokens, {computed} computed" + (f", policy {self.policy}" if self.policy else "")]
        for r in self.ranges():
            origin = "" if r.source is None else f" (source {r.source}, from position {r.old_start})"
            lines.append(f"  {r.start:>6} … {r.end - 1:<6} {r.reason.value}{origin}")
        return "\n".join(lines)

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, raw: bytes | str) -> BlendPlan:
        """Raises ``msgspec.ValidationError`` for what is no plan."""
        return msgspec.json.decode(raw, type=cls)

    def _exact(self) -> _Mask:
        exact = self._mask(span for span in self.spans if span.exact)
        exact[self.num_tokens - self.suffix_tokens :] = False
        return exact

    def _forced(self) -> _Mask:
        forced = ~self._mask(self.spans)
        forced[self.num_tokens - self.suffix_tokens :] = True
        return forced

    def _mask(self, spans: Iterable[ReusedSpan]) -> _Mask:
        mask = np.zeros(self.num_tokens, bool)
        for span in spans:
            mask[span.start : span.end] = True
        return mask


def _apart(hits: Iterable[ReusedSpan], min_tokens: int) -> list[ReusedSpan]:
    """What :meth:`BlendPlan.of` keeps of ``hits`` that overlap, by where it begins."""
    taken: list[ReusedSpan] = []
    for hit in sorted(hits, key=lambda span: (not span.exact, span.start - span.end, span.start)):
        pieces = [hit]
        for other in taken:
            pieces = [rest for piece in pieces for rest in _without(piece, other)]
        taken.extend(piece for piece in pieces if piece is hit or piece.end - piece.start >= min_tokens)
    return sorted(taken, key=lambda span: span.start)


def _without(span: ReusedSpan, other: ReusedSpan) -> Iterator[ReusedSpan]:
    """What is left of ``span`` beside ``other``."""
    if other.end <= span.start or span.end <= other.start:
        yield span
        return
    if span.start < other.start:
        yield span.cut(span.start, other.start)
    if other.end < span.end:
        yield span.cut(other.end, span.end)


def _runs(mask: _Mask) -> tuple[tuple[int, int], ...]:
    """The runs of True in a bool vector, as half-open ranges."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
