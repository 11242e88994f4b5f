"""The scheduler role: what can be reused, and what each step loads and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmcache.integration.guard import never_raise, report_failure
from lmcache.integration.vllm.blend.scheduling import BlendScheduling, PreparedBlend
from lmcache.integration.vllm.connector_metadata import BlendOp, LMCacheConnectorMetadata, LoadOp
from lmcache.integration.vllm.parallel.ranked_cache import RankedCache
from lmcache.integration.vllm.request_tracker import RequestTracker
from lmcache.integration.vllm.save_planner import SavePlanner
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.integration.vllm.stalls import RequestStalls
from lmcache.observability.logging import init_logger
from lmcache.observability.metrics import Metrics
from lmcache.observability.ranges import Range

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)

# A save under load stands in line behind others: longer than that, to compute a chunk again is sooner done.
_MAX_SAVE_WAIT_SECONDS = 0.5


class SchedulerSide:
    """Looks prompts up, holds what was found until the worker role has loaded it, and plans the saves."""

    def __init__(
        self, shared: SharedEngine | RankedCache, make_scheduling: Callable[[], BlendScheduling | None]
    ) -> None:
        """``make_scheduling`` gives the scheduler's half of CacheBlend once the worker role has made its own."""
        self._shared = shared
        self._engine = shared.engine
        self._config = shared.config
        self._save_planner = SavePlanner(shared)
        self._trackers: dict[str, RequestTracker] = {}
        self._asynchronous_loads: list[LoadOp] = []
        self._has_sent_ahead = False
        self._make_scheduling: Callable[[], BlendScheduling | None] | None = make_scheduling
        self._stalls = RequestStalls(shared.metrics)

    @property
    def metrics(self) -> Metrics:
        return self._shared.metrics

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        """Tokens beyond ``num_computed_tokens`` that the cache will supply; None while that is not known yet.

        Nothing is promised before its bytes are in host memory, so a slow or broken disk never fails a request. The
        last token is always left for vLLM: it gives the first logits.
        """
        tokens = self._reusable(request, num_computed_tokens)
        self._stalls.looked_up(request.request_id, answered=tokens is not None)
        return tokens

    @never_raise(lambda: 0)
    @Range("look up")
    def _reusable(self, request: Request, num_computed_tokens: int) -> int | None:
        tracker = self._tracker(request)
        if tracker.skip_load or not self._shared.serves or request.request_id in self._shared.failed_loads:
            return 0
        if not self._look_up(tracker):
            return None
        lease = tracker.lease
        assert lease is not None
        if not lease.ready():
            if self._may_wait(tracker):
                return None
            lease.cut()
        elif self._awaits_save(tracker, num_computed_tokens) and self._may_wait(tracker, _MAX_SAVE_WAIT_SECONDS):
            tracker.leased_for = -1  # look again
            return None
        self._send_ahead(tracker, num_computed_tokens)
        exact = max(lease.num_tokens, num_computed_tokens)
        blended = self._blend(tracker, exact, num_computed_tokens)
        if blended is None:
            return None
        tracker.waiting_since = None
        tracker.local_tokens = num_computed_tokens
        reusable: int = min(request.num_tokens if blended else lease.num_tokens, request.num_tokens - 1)
        reusable -= num_computed_tokens
        if reusable <= 0:
            tracker.drop_lease()
            return 0
        return reusable

    def _blend(self, tracker: RequestTracker, exact_tokens: int, local_tokens: int) -> bool | None:
        """Whether the tokens behind ``exact_tokens`` are to be blended; None while that is not known yet."""
        scheduling = self._blend_scheduling()
        if scheduling is None or tracker.blend is None or exact_tokens >= tracker.request.num_tokens - 1:
            return False
        try:
            namespace = self._engine.namespace(lora=tracker.lora, cache_salt=tracker.cache_salt, paged=True)
            tokens = tracker.tokens()
            if not scheduling.look_up(tracker.blend, tokens, exact_tokens, namespace) and self._may_wait(tracker):
                return None
            others = (other.request for other in self._trackers.values())
            if scheduling.prefix_in_flight(tracker.request, local_tokens, others):
                return None if self._may_wait(tracker) else False
            promised = scheduling.promise(tracker.blend, tracker.request, tokens, exact_tokens)
        except Exception as error:
            report_failure(self.metrics, "blend_look_up", error)
            return False
        if promised and tracker.blend.prepared is not None:
            self._stage(tracker.blend.prepared)
        return promised

    @never_raise(lambda: None)
    def _send_ahead(self, tracker: RequestTracker, local_tokens: int) -> None:
        """The GPU's link is free while the rest is looked up and vLLM prepares its step. Once a request, and once a
        step: what vLLM finds no room for has gone in vain."""
        lease = tracker.lease
        if self._has_sent_ahead or self._config.use_layerwise or lease is None or tracker.sent_ahead is lease:
            return
        if min(lease.num_tokens, tracker.request.num_tokens - 1) > local_tokens:
            self._has_sent_ahead, tracker.sent_ahead = True, lease
            self._shared.send_ahead(lease, local_tokens)

    @never_raise(lambda: None)
    def _stage(self, prepared: PreparedBlend) -> None:
        self._shared.stage(prepared)

    def _blend_scheduling(self) -> BlendScheduling | None:
        """Made once, when the worker role has found that the model can be blended."""
        if self._make_scheduling is not None and self._shared.blends:
            make, self._make_scheduling = self._make_scheduling, None
            try:
                self._shared.blend_scheduling = make()
            except Exception as error:
                self.metrics.blend_fallback("configuration")
                logger.error("CacheBlend stays off: %s", error)
        return self._shared.blend_scheduling

    def load_is_asynchronous(self, request: Request) -> bool:
        """Whether what was promised may be loaded beside the forward. A blend needs the model, so it may not."""
        tracker = self._trackers.get(request.request_id)
        return tracker is None or not tracker.blends

    def update_state_after_alloc(
        self, request: Request, num_external_tokens: int, block_ids: list[int] | None = None
    ) -> None:
        """vLLM took ``num_external_tokens`` of what was promised (all of it or nothing).

        With ``block_ids`` the load is asynchronous: it starts now, and the request is scheduled once it is done.
        """
        tracker = self._trackers.get(request.request_id)
        if tracker is None:  # its first look-up failed, so nothing was promised
            return
        tracker.external_tokens = num_external_tokens
        if num_external_tokens == 0:
            tracker.drop_lease()
        elif block_ids is not None and not tracker.blends:
            tracker.block_ids = list(block_ids)
            self._asynchronous_loads.append(self._hand_over(tracker))

    def build_connector_meta(self, output: SchedulerOutput) -> LMCacheConnectorMetadata:
        """Loads and saves of this step. A request that cannot be planned is computed by vLLM."""
        meta = LMCacheConnectorMetadata(asynchronous_loads=self._asynchronous_loads)
        if self._shared.blend_scheduling is not None:
            self._shared.blend_scheduling.next_step()
        self._asynchronous_loads, self._has_sent_ahead = [], False
        cached = output.scheduled_cached_reqs
        steps = [(new.req_id, new.block_ids[0], True, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        steps += [
            (req_id, [] if blocks is None else blocks[0], req_id in cached.resumed_req_ids, computed)
            for req_id, blocks, computed in zip(
                cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
            )
        ]
        for req_id, blocks, replaces_blocks, _ in steps:
            self._plan_loads(meta, req_id, blocks, replaces_blocks=replaces_blocks)
        meta.preempted = [req_id for req_id, tracker in self._trackers.items() if tracker.was_preempted()]
        if meta.fills_pages and not getattr(output, "new_block_ids_to_zero", None):
            self._shared.begin_early(meta)
        # Only now: saves come after the step, so that its blends need not wait for what names and cuts them.
        for req_id, _, _, computed in steps:
            self._plan_saves(meta, req_id, computed, output.num_scheduled_tokens[req_id])
        return meta

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks must stay until a save has read them, and what the client is told."""
        # Once the answer is yes it must reach vLLM: it frees the blocks when the worker role names the request.
        delay = self._shared.saves.delay_free(request.request_id)
        milliseconds = self._stalls.ended(request.request_id)
        return delay, self._forget(request.request_id, milliseconds)

    @never_raise(lambda: None)
    def _forget(self, req_id: str, milliseconds: dict[str, float]) -> dict[str, Any] | None:
        tracker = self._trackers.pop(req_id, None)
        if tracker is None:
            return None
        tracker.drop_lease()
        self._shared.settle(req_id)
        tracker.blend_report = self._shared.blend_reports.pop(req_id, None)
        if tracker.blend is not None and tracker.blend_report is not None:
            waited = {"find": tracker.blend.find_seconds, "wait": tracker.blend.wait_seconds}
            in_ms = {phase: round(1e3 * seconds, 3) for phase, seconds in waited.items()}
            tracker.blend_report["milliseconds"] = {**in_ms, **tracker.blend_report["milliseconds"]}
        if req_id in self._shared.failed_loads:
            self._shared.failed_loads.discard(req_id)
            tracker.reused_tokens, tracker.tiers = 0, {}
            tracker.passage_tokens, tracker.passage_tiers = 0, {}
        return tracker.summary(milliseconds)

    @never_raise(lambda: False)
    def reset_cache(self) -> bool:
        """Forget everything, in every tier (vLLM's ``reset_prefix_cache`` with ``reset_connector``)."""
        self._shared.saves.wait()
        self._engine.clear()
        return True

    def close(self) -> None:
        for tracker in self._trackers.values():
            tracker.drop_lease()
        self._trackers.clear()

    def _tracker(self, request: Request) -> RequestTracker:
        tracker = self._trackers.get(request.request_id)
        if tracker is None:
            tracker = self._trackers[request.request_id] = RequestTracker.of(request)
            if (scheduling := self._blend_scheduling()) is not None:
                tracker.blend = scheduling.of(request)
        return tracker

    def _look_up(self, tracker: RequestTracker) -> bool:
        """Take a lease for the request as it is now, unless it has one; False while shared stores are being asked."""
        num_tokens = tracker.request.num_tokens
        if tracker.lease is not None and tracker.leased_for == num_tokens:
            return True
        tokens = tracker.tokens()
        lora, salt = tracker.lora, tracker.cache_salt
        if tracker.asked_for != num_tokens:
            tracker.drop_lease()
            tracker.keys = self._engine.prefix_keys(tokens, paged=True, lora=lora, cache_salt=salt)
            tracker.inquiry, tracker.asked_for = self._engine.ask(tracker.keys), num_tokens
        if tracker.inquiry is not None and not tracker.inquiry.ready():
            return False
        tracker.inquiry = None
        tracker.drop_lease()
        tracker.lease = self._engine.prefetch(tokens, paged=True, lora=lora, cache_salt=salt, keys=tracker.keys)
        tracker.leased_for = num_tokens
        return True

    def _awaits_save(self, tracker: RequestTracker, local_tokens: int) -> bool:
        """Whether the first chunk that neither we nor vLLM's own cache have is being saved right now, by a request just
        before this one."""
        assert tracker.lease is not None
        first_missing = max(tracker.lease.num_tokens, local_tokens) // self._config.chunk_size
        return first_missing < len(tracker.keys) and self._shared.saves.will_hold(tracker.keys[first_missing])

    def _may_wait(self, tracker: RequestTracker, limit: float = math.inf) -> bool:
        now = time.monotonic()
        if tracker.waiting_since is None:
            tracker.waiting_since = now
        return now - tracker.waiting_since < min(limit, self._config.max_disk_wait_seconds)

    def _plan_loads(
        self, meta: LMCacheConnectorMetadata, req_id: str, blocks: list[int], *, replaces_blocks: bool
    ) -> None:
        tracker = self._trackers.get(req_id)
        if tracker is None:
            return
        if replaces_blocks:
            tracker.block_ids = list(blocks)
        else:
            tracker.block_ids.extend(blocks)
        if tracker.blends and tracker.external_tokens:
            self._hand_over_blend(meta, tracker)
        elif tracker.external_tokens:
            meta.loads.append(self._hand_over(tracker))

    def _plan_saves(self, meta: LMCacheConnectorMetadata, req_id: str, num_computed: int, num_scheduled: int) -> None:
        tracker = self._trackers.get(req_id)
        if tracker is None:
            return
        try:
            self._save_planner.plan(meta, tracker, num_computed, num_scheduled)
        except Exception as error:
            report_failure(self.metrics, "build_connector_meta", error)

    def _hand_over(self, tracker: RequestTracker) -> LoadOp:
        """Pass the lease to the worker role. A promise without one (it cannot be) becomes a failed load there."""
        request = tracker.request
        end, tracker.external_tokens = tracker.local_tokens + tracker.external_tokens, 0
        name = ""
        if (lease := tracker.take_lease()) is not None:
            name = self._shared.hand_over(request.request_id, lease)
            # The promise leaves the last token of a full hit to vLLM; its slot exists, so whole pages can be copied.
            end = lease.num_tokens
            if request.num_preemptions == 0:
                tracker.reused_tokens = min(end, request.num_tokens - 1) - tracker.local_tokens
                tracker.tiers = lease.tokens_by_tier(tracker.local_tokens)
        return LoadOp(
            request.request_id,
            tracker.tokens()[:end],
            tracker.local_tokens,
            end,
            list(tracker.block_ids),
            name,
            tokens_say_all=not getattr(request, "mm_features", None),
        )

    def _hand_over_blend(self, meta: LMCacheConnectorMetadata, tracker: RequestTracker) -> None:
        """Pass the exact prefix and what was found behind it to the worker role."""
        request, blend = tracker.request, tracker.blend
        assert blend is not None
        prepared = blend.take()
        tracker.tiers, tracker.reused_tokens = {}, 0
        tracker.passage_tokens, tracker.passage_tiers = 0, {}
        if tracker.lease is not None and tracker.lease.num_tokens > tracker.local_tokens:
            meta.loads.append(self._hand_over(tracker))
        else:
            tracker.drop_lease()
        tracker.external_tokens = 0
        op = BlendOp(request.request_id, prepared.exact_tokens, list(tracker.block_ids))
        meta.blends.append(self._shared.hand_over_blend(op, prepared, request.kv_transfer_params or {}))
        if request.num_preemptions == 0:
            tracker.passage_tokens = prepared.reused_tokens
            tracker.passage_tiers = prepared.tokens_by_tier()
