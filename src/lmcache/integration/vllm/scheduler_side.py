"""The scheduler role: what can be reused, and what each step loads and saves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lmcache.integration.vllm.connector_metadata import LMCacheConnectorMetadata, LoadOp, SaveOp
from lmcache.integration.vllm.guard import never_raise, report_failure
from lmcache.integration.vllm.request_tracker import RequestTracker
from lmcache.integration.vllm.shared_engine import SharedEngine
from lmcache.observability.metrics import Metrics

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class SchedulerSide:
    """Looks prompts up, holds what was found until the worker role has loaded it, and plans the saves."""

    def __init__(self, shared: SharedEngine) -> None:
        self._shared = shared
        self._engine = shared.engine
        self._config = shared.config
        self._trackers: dict[str, RequestTracker] = {}
        self._asynchronous_loads: list[LoadOp] = []

    @property
    def metrics(self) -> Metrics:
        return self._shared.metrics

    @never_raise(lambda: 0)
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        """Tokens beyond ``num_computed_tokens`` that the cache will supply; None while that is not known yet.

        Nothing is promised before its bytes are in host memory, so a slow or broken disk never fails a request. The
        last token is always left for vLLM: it gives the first logits.
        """
        tracker = self._tracker(request)
        if tracker.skip_load or self._engine.gpu_connector is None or request.request_id in self._shared.failed_loads:
            return 0
        self._look_up(tracker)
        lease = tracker.lease
        assert lease is not None
        if not lease.ready() or self._awaits_save(tracker):
            if self._may_wait(tracker):
                return None
            lease.cut()
        tracker.wait_until = None
        tracker.local_tokens = num_computed_tokens
        reusable: int = min(lease.num_tokens, request.num_tokens - 1) - num_computed_tokens
        if reusable <= 0:
            tracker.drop_lease()
            return 0
        return reusable

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
        elif block_ids is not None:
            tracker.block_ids = list(block_ids)
            self._asynchronous_loads.append(self._hand_over(tracker))

    def build_connector_meta(self, output: SchedulerOutput) -> LMCacheConnectorMetadata:
        """Loads and saves of this step. A request that cannot be planned is computed by vLLM."""
        meta = LMCacheConnectorMetadata(asynchronous_loads=self._asynchronous_loads)
        self._asynchronous_loads = []
        for new in output.scheduled_new_reqs:
            self._plan(meta, output, new.req_id, new.block_ids[0], True, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for req_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            new_blocks = [] if blocks is None else blocks[0]
            self._plan(meta, output, req_id, new_blocks, req_id in cached.resumed_req_ids, computed)
        meta.preempted = [req_id for req_id, tracker in self._trackers.items() if tracker.was_preempted()]
        return meta

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks must stay until a save has read them, and what the client is told."""
        # Once the answer is yes it must reach vLLM: it frees the blocks when the worker role names the request.
        delay = self._shared.saves.delay_free(request.request_id)
        return delay, self._forget(request.request_id)

    @never_raise(lambda: None)
    def _forget(self, req_id: str) -> dict[str, Any] | None:
        tracker = self._trackers.pop(req_id, None)
        if tracker is None:
            return None
        tracker.drop_lease()
        if req_id in self._shared.failed_loads:
            self._shared.failed_loads.discard(req_id)
            tracker.reused_tokens, tracker.tiers = 0, {}
        return tracker.summary()

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
        return tracker

    def _look_up(self, tracker: RequestTracker) -> None:
        """Take a lease for the request as it is now, unless it has one."""
        num_tokens = tracker.request.num_tokens
        if tracker.lease is not None and tracker.leased_for == num_tokens:
            return
        tracker.drop_lease()
        tokens = tracker.request.all_token_ids[:]
        lora, salt = tracker.lora, tracker.cache_salt
        tracker.keys = self._engine.prefix_keys(tokens, paged=True, lora=lora, cache_salt=salt)
        tracker.lease = self._engine.prefetch(tokens, paged=True, lora=lora, cache_salt=salt, keys=tracker.keys)
        tracker.leased_for = num_tokens

    def _awaits_save(self, tracker: RequestTracker) -> bool:
        """Whether the first chunk that is missing is being saved right now, by a request just before this one."""
        assert tracker.lease is not None
        first_missing = tracker.lease.num_tokens // self._config.chunk_size
        if first_missing >= len(tracker.keys):
            return False
        if self._shared.saves.will_hold(tracker.keys[first_missing]):
            tracker.leased_for = -1  # look again
            return True
        return False

    def _may_wait(self, tracker: RequestTracker) -> bool:
        now = time.monotonic()
        if tracker.wait_until is None:
            tracker.wait_until = now + self._config.max_disk_wait_seconds
        return now < tracker.wait_until

    def _plan(
        self,
        meta: LMCacheConnectorMetadata,
        output: SchedulerOutput,
        req_id: str,
        blocks: list[int],
        replaces_blocks: bool,
        num_computed: int,
    ) -> None:
        tracker = self._trackers.get(req_id)
        if tracker is None:
            return
        if replaces_blocks:
            tracker.block_ids = list(blocks)
        else:
            tracker.block_ids.extend(blocks)
        if tracker.external_tokens:
            meta.loads.append(self._hand_over(tracker))
        try:
            self._plan_save(meta, tracker, num_computed, output.num_scheduled_tokens[req_id])
        except Exception as error:
            report_failure(self.metrics, "build_connector_meta", error)

    def _hand_over(self, tracker: RequestTracker) -> LoadOp:
        """Pass the lease to the worker role. A promise without one (it cannot be) becomes a failed load there."""
        request = tracker.request
        end, tracker.external_tokens = tracker.local_tokens + tracker.external_tokens, 0
        if (lease := tracker.take_lease()) is not None:
            self._shared.handed_over[request.request_id] = lease
            # The promise leaves the last token of a full hit to vLLM; its slot exists, so whole pages can be copied.
            end = lease.num_tokens
            if request.num_preemptions == 0:
                tracker.reused_tokens = min(end, request.num_tokens - 1) - tracker.local_tokens
                tracker.tiers = lease.tokens_by_tier(tracker.local_tokens)
        return LoadOp(
            request.request_id, request.all_token_ids[:end], tracker.local_tokens, end, list(tracker.block_ids)
        )

    def _plan_save(
        self, meta: LMCacheConnectorMetadata, tracker: RequestTracker, num_computed: int, num_scheduled: int
    ) -> None:
        if tracker.skip_save or self._engine.gpu_connector is None:
            return
        request, chunk_size = tracker.request, self._config.chunk_size
        valid = min(num_computed + num_scheduled, request.num_prompt_tokens)
        if self._config.save_decode_cache and valid == request.num_prompt_tokens:
            # Of the generated tokens only those that vLLM has fed back and will not take back (drafts, in-flight
            # steps) have final KV.
            valid = max(valid, min(num_computed, request.num_tokens - 1))
        num_chunks = valid // chunk_size
        end = num_chunks * chunk_size
        if self._config.save_unfull_chunk and valid == request.num_prompt_tokens > end and not tracker.tail_saved:
            tracker.tail_saved = True
            num_chunks, end = num_chunks + 1, valid
        elif num_chunks <= tracker.saved_chunks:
            return
        tokens = request.all_token_ids[:end]
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
            )
        )
