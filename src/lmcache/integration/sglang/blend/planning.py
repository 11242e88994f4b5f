"""Which requests of SGLang are blended, and with what; and which passages are remembered for others."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lmcache.blend.coverage import Declined, choose_passages, covered
from lmcache.blend.find_passages import FoundPassages, PassageFinder
from lmcache.blend.passage_lease import HeldPassage, PassageLease
from lmcache.cache_engine import LMCacheEngine
from lmcache.integration.blend.options import BlendDefaults, BlendOptions
from lmcache.integration.guard import report_failure
from lmcache.integration.sglang.blend.blender import Blender, PreparedBlend
from lmcache.integration.sglang.blend.scheduler_access import SchedulerAccess
from lmcache.integration.sglang.generation_c.operations import Lookup
from lmcache.integration.sglang.tenants import blended_key
from lmcache.integration.sglang.tp_agreement import all_reduce, min_over_ranks
from lmcache.keys import PrefixKey, Tokens, token_array
from lmcache.observability.logging import init_logger, log_limited
from lmcache.prompt import MIN_RUN_TOKENS, Chunk, placed_chunks
from lmcache.segmentation.anchors import WINDOW
from lmcache.segmentation.known_passages import KnownChunk, KnownPassages

logger = init_logger(__name__)


@dataclass
class _Seen:
    """A request, and where passages of its prompt are known to begin."""

    req: Any
    seams: list[int]


@dataclass
class Wanted:
    """A request whose passages are looked for behind ``exact_tokens``; the first ``len(resident)`` of these are in the
    radix tree, at a node that ``unlock`` lets go."""

    req: Any
    token_ids: list[int]
    options: BlendOptions
    exact_tokens: int
    found: FoundPassages[PassageLease]
    resident: torch.Tensor
    unlock: Any
    seams: list[int]
    prepared: PreparedBlend | None = None

    def release(self) -> None:
        """Idempotent."""
        self.found.lease.release()
        unlock, self.unlock = self.unlock, None
        if unlock is not None:
            unlock()


class BlendPlanning:
    """Decides for each request when its look-up is polled. An error of a request is its own: it is not blended."""

    def __init__(
        self,
        engine: LMCacheEngine,
        known: KnownPassages,
        finder: PassageFinder,
        blender: Blender,
        access: SchedulerAccess,
        page_size: int,
        groups: Sequence[Any],
    ) -> None:
        self._groups = groups
        self._engine = engine
        self._config = engine.config
        self._metrics = engine.metrics
        self._known = known
        self._finder = finder
        self._blender = blender
        self._access = access
        self._page_size = page_size
        self._defaults = BlendDefaults(engine.config)
        self._seen: dict[str, _Seen] = {}
        self._tails_kept: set[str] = set()

    # Deciding

    def poll(self, lookup: Lookup, flow: Any, exact_tokens: int) -> int | None:
        """How many leading tokens are promised in all; None while passages are still read.

        ``exact_tokens`` are promised anyhow. When more is, the request has left the radix tree's common part: its KV is
        in there under a key of its own.
        """
        if not lookup.planned:
            lookup.planned = True
            lookup.wanted = self._looked(lookup, flow, exact_tokens)
        wanted: Wanted | None = lookup.wanted
        if wanted is None:
            return exact_tokens
        ready = wanted.found.lease.ready() or time.monotonic() >= lookup.deadline
        if not min_over_ranks(int(ready), self._groups):
            return None
        wanted.found.lease.cut()
        end = (len(wanted.token_ids) - 1) // self._page_size * self._page_size
        end = min(end, len(flow.key))
        chosen = self._agreed(choose_passages(wanted.found, wanted.exact_tokens, end, self._config), end)
        if isinstance(chosen, Declined):
            self._declined(*chosen)
            lookup.wanted = None
            wanted.release()
            return exact_tokens
        wanted.prepared = PreparedBlend(
            wanted.token_ids, wanted.exact_tokens, chosen, wanted.found.lease, wanted.options
        )
        # First the flow, then the request: SGLang matches both before it loads.
        flow.key = copy.copy(flow.key)
        flow.key.extra_key = wanted.req.extra_key = blended_key(wanted.req.extra_key, lookup.request_id)
        return end

    def _looked(self, lookup: Lookup, flow: Any, exact_tokens: int) -> Wanted | None:
        """What every rank wants; None where one does not."""
        wanted: Wanted | None = None
        try:
            wanted = self._look(lookup, flow, exact_tokens)
        except Exception as error:
            report_failure(self._metrics, "blend_plan", error)
        if not min_over_ranks(int(wanted is not None), self._groups):
            if wanted is not None:
                wanted.release()
            return None
        assert wanted is not None
        # Ranks may have kept more or less of a prompt in their trees; what one lacks is computed by all.
        wanted.exact_tokens = min_over_ranks(wanted.exact_tokens, self._groups)
        wanted.resident = wanted.resident[: wanted.exact_tokens]
        return wanted

    def _agreed(self, chosen: list[HeldPassage] | Declined, end: int) -> list[HeldPassage] | Declined:
        """``chosen``, where every rank has the same."""
        places = torch.zeros(end, dtype=torch.int64)
        for passage in () if isinstance(chosen, Declined) else chosen:
            count = passage.end - passage.start
            places[passage.start : passage.end] = torch.arange(1, count + 1) + passage.old_start
        least, most = places.clone(), places
        all_reduce(least, torch.distributed.ReduceOp.MIN, self._groups)
        all_reduce(most, torch.distributed.ReduceOp.MAX, self._groups)
        if torch.equal(least, most) or isinstance(chosen, Declined):
            return chosen
        return Declined("ranks", "the ranks hold different passages")

    def _look(self, lookup: Lookup, flow: Any, exact_tokens: int) -> Wanted | None:
        req = self._access.waiting(lookup.request_id)
        if req is None or not lookup.exact:
            return None
        seen = self._seen[lookup.request_id] = _Seen(req, [])
        if getattr(req, "multimodal_inputs", None) is not None:
            return None  # placeholders of pictures say nothing of their KV
        try:
            options = self._defaults.for_request(self._access.custom_params(req))
            tokens = [int(token) for token in req.origin_input_ids]
            ranges = self._finder.ranges(tokens, options.segments)
        except ValueError as error:
            self._declined("bad_request", str(error))
            return None
        # Also of a request that is not to be blended: its passages are kept for others.
        seen.seams = [start for start, _ in ranges or ()]
        if not options.enabled or self._access.wants_whole_prompt(req):
            return None
        resident, unlock = self._resident(flow)
        if len(resident) < exact_tokens:
            resident = resident[:0]
        exact = max(exact_tokens, len(resident))
        namespace = self._engine.namespace(paged=True, cache_salt=lookup.cache_salt)
        self._finder.ask(tokens, exact, ranges, namespace).wait()
        found = self._finder.find(tokens, exact, ranges, namespace)
        return Wanted(req, tokens, options, exact, found, resident, unlock, seen.seams)

    def _resident(self, flow: Any) -> tuple[torch.Tensor, Any]:
        """Slots of what the radix tree has of the prompt, held until the call that comes with them."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        tree = self._access.tree_cache
        matched = tree.match_prefix(MatchPrefixParams(key=flow.key))
        count, node = int(matched.device_prefix_len), matched.last_device_node
        slots = tree.path_device_indices(node)[:count].to("cpu", torch.int64)
        if not count:
            return slots, None
        lock = tree.inc_lock_ref(node).to_dec_params()
        return slots, lambda: tree.dec_lock_ref(node, lock)

    def _declined(self, reason: str, words: str) -> None:
        self._metrics.blend_fallback(reason)
        logger.debug("a request is not blended: %s", words)
        if reason == "bad_request":
            log_limited(logger, logging.WARNING, f"blend:{reason}", "a request is not blended: %s", words)

    # Blending

    def fill(self, lookup: Lookup, slots: torch.Tensor) -> bool:
        """Run what was promised into ``slots``, those of the first tokens of the prompt."""
        wanted: Wanted = lookup.wanted
        prepared = wanted.prepared
        assert prepared is not None
        slots = slots.to("cpu", torch.int64)
        exact = prepared.exact_tokens
        if exact > len(slots):
            return False
        if len(wanted.resident):
            self._blender.copy(wanted.resident, slots[:exact])
        elif exact:
            found = self._engine.retrieve(
                lookup.token_ids[:exact], slot_mapping=slots[:exact], cache_salt=lookup.cache_salt, lease=lookup.lease
            )
            if int(found.sum()) < exact:
                return False
        result = self._blender.run(prepared, slots)
        fallback = result.fallbacks[0]
        reused = int(covered(prepared.passages, len(slots))[exact:].sum())
        if fallback is not None:
            self._declined("passage_load", fallback)
        else:
            recomputed = sum(end - start for start, end in result.plans[0].selected)
            self._metrics.blended(reused, recomputed, result.seconds)
            logger.debug(
                "CacheBlend of %s: %d tokens reused, %d of them exact, %d recomputed",
                *(lookup.request_id, exact + reused, exact, recomputed),
            )
        self._keep_holes(lookup, prepared, slots, wanted.seams)
        return True

    # Remembering

    def remember(self, request_id: str, tokens: Tokens, keys: Sequence[PrefixKey], start: int) -> None:
        """Let the chunks of an exact prefix from ``start`` on be found anywhere."""
        size = self._config.chunk_size
        array, first = token_array(tokens), start // size
        chunks = [
            KnownChunk(key, array[at * size : (at + 1) * size], at * size)
            for at, key in enumerate(keys[first:], start=first)
        ]
        if chunks:
            seen = self._seen.get(request_id)
            self._known.add_prompt(
                chunks, seen.seams if seen is not None else (), before=keys[first - 1] if first else None
            )

    def keep_tail(self, request_id: str, keys: Sequence[PrefixKey], cache_salt: str) -> Callable[[], None]:
        """Keep the end of a computed prompt, which fills no chunk, as a passage.

        What is returned lets it be found: to be called when the chunks before it are known, from which it goes on.
        """
        seen = self._seen.get(request_id)
        if seen is None or request_id in self._tails_kept or not self._access.has_computed_prompt(seen.req):
            return _nothing
        req = seen.req
        self._tails_kept.add(request_id)
        tokens, size = [int(token) for token in req.origin_input_ids], self._config.chunk_size
        first = len(tokens) // size * size
        if len(tokens) - first >= WINDOW and len(keys) == first // size:
            self._access.wait_for_forwards()
            slots = self._access.slots(req, len(tokens))
            return self._keep(tokens, [(first, len(tokens))], slots, cache_salt, keys[-1:], seen.seams)
        return _nothing

    def forget(self, request_id: str) -> None:
        self._seen.pop(request_id, None)
        self._tails_kept.discard(request_id)

    def _keep_holes(self, lookup: Lookup, prepared: PreparedBlend, slots: torch.Tensor, seams: list[int]) -> None:
        ranges = [run for run in prepared.holes(len(slots)) if run[1] - run[0] >= MIN_RUN_TOKENS]
        self._keep(prepared.token_ids[: len(slots)], ranges, slots, lookup.cache_salt, (), seams)()

    def _keep(
        self,
        tokens: list[int],
        ranges: Sequence[tuple[int, int]],
        slots: torch.Tensor,
        cache_salt: str,
        before: Sequence[PrefixKey],
        seams: Sequence[int] = (),
    ) -> Callable[[], None]:
        namespace = self._engine.namespace(cache_salt=cache_salt, paged=True)
        runs: list[list[KnownChunk]] = []
        for first, last in ranges:
            chunks: list[Chunk] = placed_chunks(namespace, tokens, first, last, self._config.chunk_size)
            self._engine.store_chunks(chunks, slots)
            runs.append(
                [KnownChunk(c.key, np.asarray(tokens[c.start : c.end], dtype=np.uint32), c.start) for c in chunks]
            )

        def make_known() -> None:
            for run in runs:
                self._known.add_prompt(run, seams, before=before[0] if before else None)

        return make_known


def _nothing() -> None:
    pass
