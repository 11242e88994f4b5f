"""The scheduler role's half of CacheBlend: which requests are blended, and with what."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from vllm.v1.request import RequestStatus

from lmcache.blend.coverage import Declined, choose_passages, covered, holes
from lmcache.blend.find_passages import FoundPassages, Range
from lmcache.blend.passage_lease import HeldPassage, PassageHold
from lmcache.config import LMCacheEngineConfig
from lmcache.integration.blend.options import BlendDefaults, BlendOptions
from lmcache.integration.vllm.blend.block_hashes import SaltedBlockHashes
from lmcache.keys import Namespace, Tokens
from lmcache.observability.logging import init_logger, log_limited
from lmcache.observability.metrics import Metrics
from lmcache.storage.inquiry import Inquiry

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger(__name__)


class Finder(Protocol):
    """A :class:`lmcache.blend.find_passages.PassageFinder`, here or in other processes."""

    def ranges(self, tokens: list[int], segments: Any) -> list[Range] | None: ...

    def ask(self, tokens: Tokens, start: int, ranges: list[Range] | None, namespace: Namespace) -> Inquiry: ...

    def find(
        self, tokens: Tokens, start: int, ranges: list[Range] | None, namespace: Namespace
    ) -> FoundPassages[Any]: ...


@dataclass
class PreparedBlend:
    """A promise to the scheduler: the worker role fills the pages behind ``exact_tokens`` up to the last token."""

    token_ids: Tokens
    exact_tokens: int
    passages: list[HeldPassage]
    lease: PassageHold
    options: BlendOptions

    @property
    def reused_tokens(self) -> int:
        return int(np.count_nonzero(covered(self.passages, len(self.token_ids))))

    @property
    def num_computed(self) -> int:
        """Tokens that the blend computes, about."""
        reused = self.reused_tokens
        return len(self.token_ids) - self.exact_tokens - reused + round(self.options.ratio * reused)

    def tokens_by_tier(self) -> dict[str, int]:
        tiers: dict[str, int] = {}
        for passage in self.passages:
            for tier, tokens in passage.tokens_by_tier.items():
                tiers[tier] = tiers.get(tier, 0) + tokens
        return tiers

    def holes(self) -> list[Range]:
        """Half-open ranges behind the exact tokens that no passage has."""
        return holes(self.passages, self.exact_tokens, len(self.token_ids))


@dataclass
class RequestBlend:
    """What is known of one request's blend; ``fallback`` says why there is none."""

    options: BlendOptions | None
    ranges: list[Range] | None = None
    hashes: SaltedBlockHashes = field(default_factory=SaltedBlockHashes)
    inquiry: Inquiry | None = None
    """What other servers were asked before the cache was searched."""
    asked_for: tuple[int, int] = (-1, -1)
    found: FoundPassages[Any] | None = None
    found_for: tuple[int, int] = (-1, -1)
    prepared: PreparedBlend | None = None
    exact_tokens: int | None = None
    """How many leading tokens may be kept as an exact prefix; None: all, nothing was ever blended."""
    holes: list[Range] | None = None
    """What was computed anew in the last blend."""
    fallback: str | None = None
    find_seconds: float = 0.0
    asked_at: float | None = None
    wait_seconds: float = 0.0

    def release(self) -> None:
        """Give back what is held and was not handed over."""
        found, self.found = self.found, None
        self.prepared, self.found_for = None, (-1, -1)
        if found is not None:
            found.lease.release()

    def take(self) -> PreparedBlend:
        """Hand the promise over to the worker role, with what it holds."""
        assert self.prepared is not None
        prepared, self.prepared, self.found, self.found_for = self.prepared, None, None, (-1, -1)
        before = prepared.exact_tokens if self.exact_tokens is None else self.exact_tokens
        self.exact_tokens = min(before, prepared.exact_tokens)
        self.holes = prepared.holes()
        return prepared


class BlendScheduling:
    """Decides for each request, at its look-up. Errors of a request are its own: it is served without a blend."""

    def __init__(
        self,
        finder: Finder,
        defaults: BlendDefaults,
        config: LMCacheEngineConfig,
        metrics: Metrics,
        block_size: int,
        max_rows: int,
    ) -> None:
        """``max_rows``: tokens that the blends of one step compute together; a larger blend has a step of its own."""
        self._finder = finder
        self._defaults = defaults
        self._config = config
        self._metrics = metrics
        self._block_size = block_size
        self._max_rows = max_rows
        self._rows_in_step = 0

    def of(self, request: Request) -> RequestBlend:
        """The blend of a new request; one without options is never blended."""
        # Placeholders of pictures say nothing about their KV, and who wants the hidden state or the logits of every
        # token of a prompt wants every token computed.
        if (
            getattr(request, "mm_features", None)
            or getattr(request, "pooling_params", None) is not None
            or getattr(request, "skip_reading_prefix_cache", False)
        ):
            return RequestBlend(None)
        try:
            options = self._defaults.for_request(request.kv_transfer_params or {})
            # Also of a request that is not to be blended: its passages are kept for others.
            ranges = self._finder.ranges(request.prompt_token_ids or [], options.segments)
            return RequestBlend(options if options.enabled else None, ranges)
        except ValueError as error:
            return self._fallen_back(RequestBlend(None), "bad_request", str(error))

    def look_up(self, blend: RequestBlend, tokens: Tokens, exact_tokens: int, namespace: Namespace) -> bool:
        """Start to look for what stands behind ``exact_tokens`` of a request's ``tokens``; whether all reads have
        ended."""
        if blend.options is None:
            return True
        wanted = (len(tokens), exact_tokens)
        if blend.asked_for != wanted:
            blend.release()
            blend.inquiry = self._finder.ask(tokens, exact_tokens, blend.ranges, namespace)
            blend.asked_for = wanted
        if blend.inquiry is not None and not blend.inquiry.ready():
            return False
        if blend.found_for != wanted:
            blend.release()
            start = time.perf_counter()
            blend.found = self._finder.find(tokens, exact_tokens, blend.ranges, namespace)
            blend.found_for = wanted
            blend.find_seconds = time.perf_counter() - start
            blend.asked_at = time.monotonic()
        assert blend.found is not None
        return bool(blend.found.lease.ready())

    def prefix_in_flight(self, request: Request, local_tokens: int, others: Iterable[Request]) -> bool:
        """Whether one of ``others`` computes some of the first ``local_tokens`` in this very step.

        vLLM's prefix cache names blocks as soon as they are scheduled, and a blend reads them before the forward.
        """
        for other in others:
            at = other.num_computed_tokens // self._block_size
            if (
                other is not request
                and other.status == RequestStatus.RUNNING
                and at < min(local_tokens // self._block_size, len(other.block_hashes))
                and other.block_hashes[at] == request.block_hashes[at]
            ):
                return True
        return False

    def next_step(self) -> None:
        """What was promised so far is on its way to the worker role."""
        self._rows_in_step = 0

    def promise(self, blend: RequestBlend, request: Request, tokens: Tokens, exact_tokens: int) -> bool | None:
        """Whether the request is to be blended, with what has arrived by now. Its block hashes are salted then.

        None: in a later step, this one has enough to do. vLLM counts a blend as one token, so nothing else would keep
        all that wait out of one step, which those that are decoding would have to sit out.
        """
        found = blend.found
        if blend.options is None or found is None:
            return False
        if blend.prepared is not None:
            return True
        found.lease.cut()
        if blend.asked_at is not None:
            blend.wait_seconds = time.monotonic() - blend.asked_at
        chosen = choose_passages(found, exact_tokens, request.num_tokens - 1, self._config)
        if request.num_tokens < self._block_size:
            # No block of it has a name yet, so none could be kept out of vLLM's prefix cache.
            self._fallen_back(blend, "short", f"the prompt is shorter than a page of {self._block_size} tokens")
        elif isinstance(chosen, Declined):
            self._fallen_back(blend, *chosen)
        else:
            prepared = PreparedBlend(tokens, exact_tokens, chosen, found.lease, blend.options)
            rows = prepared.num_computed
            if self._rows_in_step and self._rows_in_step + rows > self._max_rows:
                return None
            # First of all: should it fail, nothing was promised.
            blend.hashes.apply(request, exact_tokens, self._block_size)
            blend.fallback = None
            blend.prepared = prepared
            self._rows_in_step += rows
            return True
        found.lease.release()
        return False

    def _fallen_back(self, blend: RequestBlend, reason: str, words: str) -> RequestBlend:
        if blend.fallback is None:
            self._metrics.blend_fallback(reason)
            if reason == "bad_request":
                log_limited(logger, logging.WARNING, f"blend:{reason}", "a request is not blended: %s", words)
            blend.fallback = words
        return blend
