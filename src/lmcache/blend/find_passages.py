"""Which passages of a prompt the cache knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from lmcache.blend.passage_lease import HeldPassage, PassageHold, PassageLease
from lmcache.cache_engine import LMCacheEngine
from lmcache.config import LMCacheEngineConfig
from lmcache.keys import CacheKey, Namespace, Tokens, token_array
from lmcache.segmentation.anchors import WINDOW
from lmcache.segmentation.explicit import explicit_passages
from lmcache.segmentation.known_passages import KnownPassages
from lmcache.segmentation.passage_index import PassageMatch, Piece
from lmcache.segmentation.separator_text import SeparatorFinder
from lmcache.segmentation.shared_passages import SharedPassages
from lmcache.segmentation.token_text import Tokenizer, TokenReader
from lmcache.storage.inquiry import Inquiry

Range = tuple[int, int]
HoldT = TypeVar("HoldT", bound=PassageHold)


@dataclass
class FoundPassages(Generic[HoldT]):
    """``ranges`` are the passages that the prompt is cut into; None where nothing but the cache tells them."""

    lease: HoldT
    ranges: list[Range] | None

    def held(self, start: int, end: int, min_tokens: int) -> list[HeldPassage]:
        """What has arrived of the tokens ``[start, end)``, those before them being exact.

        No run reaches over the border of a passage.

        Without borders, a run that goes on from the exact tokens as it did before counts them too.
        """
        if self.ranges is None:
            return self.lease.passages(start, end, min_tokens, exact_tokens=start)
        return [
            passage
            for first, last in self.ranges
            for passage in self.lease.passages(max(first, start), min(last, end), min_tokens)
        ]


class PromptCutter:
    """Cuts prompts as ``blend_segmentation`` says."""

    def __init__(self, config: LMCacheEngineConfig, tokenizer: Tokenizer | None) -> None:
        """``tokenizer`` is needed for separators, and for ranges of characters.

        Raises:
            ValueError: the separator cannot be found with this tokenizer.
        """
        self._config = config
        self._reader = TokenReader(tokenizer) if tokenizer is not None else None
        self._separator: SeparatorFinder | None = None
        if config.blend_segmentation == "separator":
            if tokenizer is None:
                raise ValueError("blend_segmentation='separator' needs the tokenizer of the model, and there is none")
            self._separator = SeparatorFinder(tokenizer, config.blend_special_str, self._reader)

    def ranges(self, tokens: Sequence[int], segments: Any) -> list[Range] | None:
        """The passages that the prompt is cut into, half-open ranges; None: only the cache knows.

        Args:
            segments: what the request said of them.

        Raises:
            ValueError: ``segments`` cannot be used.
        """
        if segments is not None:
            return explicit_passages(segments, tokens, self._reader)
        if self._separator is not None:
            return self._separator.passages(tokens)
        return [] if self._config.blend_segmentation == "explicit" else None


def find_matches(
    known: KnownPassages,
    config: LMCacheEngineConfig,
    tokens: Tokens,
    start: int,
    ranges: list[Range] | None,
    namespace: bytes,
) -> list[PassageMatch[CacheKey]]:
    """What ``known`` has of ``tokens[start:]``."""
    # Where passages are cut anyway, a part of one may be shorter.
    min_tokens = config.blend_min_tokens if ranges is None else WINDOW
    behind: npt.NDArray[np.uint32] = token_array(tokens)[start:]
    exact_tokens = start if ranges is None else 0
    found = known.find(behind, namespace, max(min_tokens, WINDOW), _seams(start, ranges), exact_tokens)
    return [_shifted(match, start) for match in found] if start else found


def ask_others(
    shared: SharedPassages | None, tokens: Tokens, start: int, ranges: list[Range] | None, namespace: bytes
) -> Inquiry:
    """Have what other servers know of ``tokens[start:]`` looked up, for :func:`find_matches`. Never blocks."""
    if shared is None or ranges == []:
        return Inquiry()
    return shared.ask(token_array(tokens)[start:], namespace, _seams(start, ranges))


class PassageFinder:
    """Cuts prompts, and finds what the cache has of them."""

    def __init__(
        self,
        engine: LMCacheEngine,
        known: KnownPassages,
        config: LMCacheEngineConfig,
        tokenizer: Tokenizer | None,
        shared: SharedPassages | None = None,
    ) -> None:
        """See :class:`PromptCutter`. ``shared`` knows what other servers know.

        Raises:
            ValueError: the separator cannot be found with this tokenizer.
        """
        self._engine = engine
        self._known = known
        self._shared = shared
        self._config = config
        self._cutter = PromptCutter(config, tokenizer)

    def ranges(self, tokens: Sequence[int], segments: Any) -> list[Range] | None:
        """See :meth:`PromptCutter.ranges`."""
        return self._cutter.ranges(tokens, segments)

    def ask(self, tokens: Tokens, start: int, ranges: list[Range] | None, namespace: Namespace) -> Inquiry:
        """Have other servers' passages looked up, for :meth:`find` with the same arguments. Never blocks."""
        return ask_others(self._shared, tokens, start, ranges, namespace.id)

    def find(
        self, tokens: Tokens, start: int, ranges: list[Range] | None, namespace: Namespace
    ) -> FoundPassages[PassageLease]:
        """Hold what the cache has of ``tokens[start:]``, and start the reads of what lies in slower tiers."""
        if ranges == []:
            return FoundPassages(PassageLease(), ranges)
        matches = find_matches(self._known, self._config, tokens, start, ranges, namespace.id)
        connector = self._engine.gpu_connector
        assert connector is not None
        return FoundPassages(PassageLease.take(self._engine.storage, matches, connector.spec), ranges)


def _seams(start: int, ranges: list[Range] | None) -> list[int]:
    """Where passages begin, counted from ``start``."""
    return [first - start for first, _ in ranges or () if first >= start]


def _shifted(match: PassageMatch[CacheKey], by: int) -> PassageMatch[CacheKey]:
    pieces = tuple(Piece(each.start + by, each.end + by, each.key, each.offset) for each in match.pieces)
    return PassageMatch(match.start + by, match.end + by, match.old_start, pieces)
