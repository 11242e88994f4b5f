"""What of a request is saved after a step: exact chunks, and with CacheBlend also what only passages can hold."""

from __future__ import annotations

from lmcache.integration.vllm.connector_metadata import (
    LMCacheConnectorMetadata,
    SaveOp,
    SegmentRun,
    SegmentSaveOp,
)
from lmcache.integration.vllm.parallel.ranked_cache import RankedCache
from lmcache.integration.vllm.request_tracker import RequestTracker
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.prompt import MIN_RUN_TOKENS, placed_chunks
from lmcache.segmentation.anchors import WINDOW


class SavePlanner:
    """Plans the saves of each step; every token of a prompt is saved once."""

    def __init__(self, shared: SharedEngine | RankedCache) -> None:
        self._shared = shared
        self._engine = shared.engine
        self._config = shared.config

    def plan(
        self, meta: LMCacheConnectorMetadata, tracker: RequestTracker, num_computed: int, num_scheduled: int
    ) -> None:
        """Add to ``meta`` what this step makes final: it computes ``num_scheduled`` tokens behind ``num_computed``."""
        if tracker.skip_save or not self._shared.serves:
            return
        request, chunk_size = tracker.request, self._config.chunk_size
        valid = min(num_computed + num_scheduled, request.num_prompt_tokens)
        whole = valid == request.num_prompt_tokens
        exact = tracker.exact_tokens
        if exact is not None and exact < valid:
            # What was computed on blended KV, generated tokens too, is no exact prefix for anybody.
            valid = exact
        elif self._config.save_decode_cache and whole:
            # Of the generated tokens only those that vLLM has fed back and will not take back (drafts, in-flight
            # steps) have final KV.
            valid = max(valid, min(num_computed, request.num_tokens - 1))
        self._plan_prefix(meta, tracker, valid, chunk_size)
        if whole and not tracker.segments_saved and self._shared.blend_scheduling is not None:
            tracker.segments_saved = True
            self._plan_segments(meta, tracker)

    def _plan_prefix(
        self, meta: LMCacheConnectorMetadata, tracker: RequestTracker, valid: int, chunk_size: int
    ) -> None:
        request = tracker.request
        num_chunks = valid // chunk_size
        end = num_chunks * chunk_size
        if self._config.save_unfull_chunk and valid == request.num_prompt_tokens > end and not tracker.tail_saved:
            tracker.tail_saved = True
            num_chunks, end = num_chunks + 1, valid
        elif num_chunks <= tracker.saved_chunks:
            return
        tokens = tracker.tokens()[:end]
        if len(tracker.keys) < num_chunks or self._config.save_unfull_chunk:
            # The last of the keys so far may be that of a chunk which was not full then.
            tracker.keys = self._engine.prefix_keys(
                tokens, paged=True, lora=tracker.lora, cache_salt=tracker.cache_salt
            )
        start, tracker.saved_chunks = tracker.saved_chunks * chunk_size, end // chunk_size
        meta.saves.append(
            SaveOp(
                req_id=request.request_id,
                token_ids=tokens,
                start=start,
                block_ids=list(tracker.block_ids),
                keys=tracker.keys[:num_chunks],
                lora=tracker.lora,
                cache_salt=tracker.cache_salt,
                seams=_seams(tracker),
            )
        )

    def _plan_segments(self, meta: LMCacheConnectorMetadata, tracker: RequestTracker) -> None:
        """The new passages of a blended prompt, or the end of another one, which fills no chunk."""
        request = tracker.request
        end = request.num_prompt_tokens
        tokens = tracker.tokens()[:end]
        namespace = self._engine.namespace(lora=tracker.lora, cache_salt=tracker.cache_salt, paged=True)
        size = self._config.chunk_size
        runs: list[SegmentRun] = []
        if tracker.blend is not None and tracker.blend.holes is not None:
            for first, last in tracker.blend.holes:
                if min(last, end) - first >= MIN_RUN_TOKENS:
                    runs.append(SegmentRun(placed_chunks(namespace, tokens, first, min(last, end), size), None))
        elif not self._config.save_unfull_chunk:
            first = end // size * size
            if end - first >= WINDOW:
                before = tracker.keys[first // size - 1] if first else None
                runs.append(SegmentRun(placed_chunks(namespace, tokens, first, end, size), before))
        if runs:
            meta.segment_saves.append(
                SegmentSaveOp(
                    req_id=request.request_id,
                    token_ids=tokens,
                    block_ids=list(tracker.block_ids),
                    runs=runs,
                    seams=_seams(tracker),
                    lora=tracker.lora,
                    cache_salt=tracker.cache_salt,
                )
            )


def _seams(tracker: RequestTracker) -> list[int]:
    """Where passages of the prompt are known to begin."""
    blend = tracker.blend
    return [] if blend is None or blend.ranges is None else [start for start, _ in blend.ranges]
