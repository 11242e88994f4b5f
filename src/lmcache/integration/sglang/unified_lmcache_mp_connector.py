"""``UnifiedLMCacheMPConnector``: what SGLang 0.5.21 and later calls with ``--enable-lmcache``.

Its name is that of a client of a daemon. Here the cache lives in SGLang's own process, and no daemon is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from lmcache.integration.guard import never_raise, report_failure
from lmcache.integration.sglang.blend.make_planning import make_planning
from lmcache.integration.sglang.blend.scheduler_access import SchedulerAccess
from lmcache.integration.sglang.generation_c.lookups import Lookups
from lmcache.integration.sglang.generation_c.operations import Load, Lookup, Store
from lmcache.integration.sglang.generation_c.pools import pools_of, refuse_other_components
from lmcache.integration.sglang.generation_c.transfers import Transfers
from lmcache.integration.sglang.shared_engine import RankOf, build
from lmcache.integration.sglang.tenants import joined, tenant_of
from lmcache.integration.sglang.tp_agreement import all_reduce, min_over_ranks
from lmcache.observability.logging import configure_for_engine, init_logger
from lmcache.observability.metrics import Metrics

SKIP_LOAD, SKIP_SAVE = "lmcache.skip_load", "lmcache.skip_save"
_ALL = sys.maxsize

logger = init_logger(__name__)

_OPERATION_TIMEOUT = 60.0  # seconds that SGLang waits for a load or a store when it resets its cache


class UnifiedLMCacheMPConnector:
    """All ranks call each method in the same order, and every answer on which SGLang decides is one that the ranks
    agreed on. After construction nothing raises."""

    def __init__(
        self,
        *,
        config_file: str | None,
        model_config: Any,
        tp_size: int,
        tp_rank: int,
        tp_group: Any,
        page_size: int,
        token_to_kv_pool_allocator: Any,
        pp_size: int = 1,
        pp_rank: int = 0,
        pp_group: Any = None,
        tree_components: Sequence[Any] = (),
        mamba_component: Any = None,
        sliding_window_size: int | None = None,
        **_later: Any,
    ) -> None:
        """Arguments are SGLang's; ``_later``: what later versions may add.

        Raises:
            ValueError: the configuration is wrong; the message names the key, the value and where it came from.
            UnsupportedSetupError: the model's KV is not of a kind that can be kept; the message says which.
        """
        configure_for_engine()
        refuse_other_components(tree_components, mamba_component, sliding_window_size)
        pools = pools_of(token_to_kv_pool_allocator.get_kvcache())
        rank = RankOf(tp_size, tp_rank, pp_size, pp_rank)
        self._manager = build(
            model_config,
            pools.keys,
            pools.values,
            rank=rank,
            kv_dtype=pools.dtype,
            page_size=page_size,
            config_file=config_file,
        )
        self.chunk_size = self._manager.config.chunk_size
        if self.chunk_size % page_size:
            self._manager.close()
            raise ValueError(
                f"chunk_size={self.chunk_size}: must be a multiple of SGLang's --page-size, which is {page_size}"
            )
        self._engine = self._manager.engine
        self._page_size = page_size
        self._groups = (tp_group, pp_group)
        access = self._access = SchedulerAccess.of_caller()
        forward_stream = None if access is None else access.forward_stream
        self._transfers = Transfers(self._engine, pools.keys[0].device, forward_stream)
        self._lookups = Lookups(self._engine)
        self._stored: dict[str, int] = {}
        self._blending = make_planning(self._manager, access, rank, page_size, self._groups)
        self._closed = False
        self.operation_timeout = _OPERATION_TIMEOUT

    @property
    def metrics(self) -> Metrics:
        return self._manager.metrics

    @property
    def open_requests(self) -> int:
        """Requests that SGLang has not finished, as far as we remember something of them."""
        return len(self._lookups.request_ids | self._stored.keys())

    # Looking up

    def build_cache_salt(self, cache_salt: str | None, extra_key: str | None) -> str:
        return joined(cache_salt, extra_key)

    def submit_lookup(
        self, rid: str, token_ids: Sequence[int], *, local_hit_tokens: int = 0, cache_salt: str = "", **_later: Any
    ) -> Lookup:
        """Hold what we have of a prompt, and start to read what lies on disk. Never blocks."""
        return self._lookups.start(rid, token_ids, cache_salt)

    def poll_lookup(self, lookup: Lookup) -> int | None:
        """How many leading tokens every rank has; None while one of them still reads."""
        if lookup.hit_tokens is None:
            if min_over_ranks(int(self._lookups.is_ready(lookup)), self._groups) == 0:
                return None
            hit = min_over_ranks(self._lookups.cut(lookup) // self._page_size * self._page_size, self._groups)
            params = self._custom_params(lookup.request_id)
            loads = min_over_ranks(int(params.get(SKIP_LOAD) is not True), self._groups)
            promised = self._poll_blend(lookup, hit) if loads else 0
            if promised is None:
                return None
            lookup.hit_tokens = promised
            kept = hit // self.chunk_size * self.chunk_size
            self._stored[lookup.request_id] = _ALL if params.get(SKIP_SAVE) is True else kept
        return lookup.hit_tokens

    def parallel_all_reduce(self, tensor: torch.Tensor, op: Any) -> None:
        """In place, over all ranks that hold the model together."""
        all_reduce(tensor, op, self._groups)

    @never_raise(lambda: None)
    def free_lookup_locks(self, rid: str, *, start: int, end: int) -> None:
        """The tokens ``[start, end)`` of a look-up are not going to be loaded."""
        lookup = self._lookups.get(rid)
        if lookup is not None and lookup.hit_tokens is not None and end >= lookup.hit_tokens:
            self._lookups.give_back(lookup)

    # Loading

    def device_indices_by_group(
        self, indices: torch.Tensor, *, mamba_value: Any = None, mamba_transfer_tokens: int | None = None, **_later: Any
    ) -> list[torch.Tensor]:
        """Slots by group of layers; there is one."""
        return [indices]

    def submit_load(
        self,
        lookup: Lookup,
        groups: Sequence[torch.Tensor],
        *,
        local_hit_tokens: int,
        owned_device_indices: torch.Tensor,
        producer_stream: Any = None,
        **_later: Any,
    ) -> Load:
        """Start to fill ``owned_device_indices``, the slots of the tokens behind ``local_hit_tokens``."""
        load = Load(lookup.request_id, local_hit_tokens, owned_device_indices)
        try:
            self._load(lookup, load, producer_stream)
        except Exception as error:
            # Raising would keep this rank out of the next agreement, and the others in it.
            report_failure(self.metrics, "load_kv", error)
            load.fail()
        return load

    def prepare_load_on_stream(self, load: Load, stream: Any) -> bool:
        """Let ``stream`` wait for the load; False when a rank has not got all of it, and the slots may be freed."""
        load.issued.wait()
        load.result = bool(min_over_ranks(int(load.all_found), self._groups))
        if not load.result:
            load.future.result()
        elif load.on_device is not None and stream is not None:
            stream.wait_event(load.on_device)
        return load.result

    def ready_prefix_count(self, operations: Sequence[Load | Store]) -> int:
        """How many of the first ``operations`` are done in every rank."""
        if not operations:
            return 0
        done = [operation.future.done() for operation in operations]
        return min_over_ranks(done.index(False) if False in done else len(done), self._groups)

    def complete_load(self, load: Load, synchronize: bool = True) -> bool:
        """Whether the load has filled its slots."""
        found = bool(load.future.result())
        return found if load.result is None else load.result

    # Storing

    def get_store_start(self, rid: str, num_tokens: int) -> int:
        """How many leading tokens of a request are kept already, in whole chunks."""
        return min(self._stored.get(rid, 0), num_tokens)

    def submit_store(
        self,
        rid: str,
        token_ids: Sequence[int],
        groups: Sequence[torch.Tensor],
        *,
        device_indices_start: int,
        cache_salt: str = "",
        **_later: Any,
    ) -> Store:
        """Start to keep the KV of the tokens from ``device_indices_start`` on, which is in the slots of ``groups``."""
        self._stored[rid] = max(self._stored.get(rid, 0), len(token_ids))
        salt, exact = tenant_of(cache_salt)
        try:
            return self._store(rid, token_ids, groups[0], device_indices_start, salt) if exact else _nothing(rid)
        except Exception as error:
            report_failure(self.metrics, "store_kv", error)
            return _nothing(rid)

    def complete_store(self, operation: Store, synchronize: bool = True) -> None:
        """The slots of ``operation`` may be reused when this returns."""
        operation.future.result()

    # Ending

    @never_raise(lambda: None)
    def finish_request(self, rid: str) -> None:
        """SGLang is done with a request."""
        self._lookups.end(rid)
        self._stored.pop(rid, None)
        if self._blending is not None:
            self._blending.forget(rid)

    @never_raise(lambda: None)
    def end_all_sessions(self) -> None:
        for rid in self._lookups.request_ids | self._stored.keys():
            self.finish_request(rid)

    @never_raise(lambda: False)
    def clear(self) -> bool:
        """Forget everything, in every tier."""
        self._engine.clear()
        return True

    @never_raise(lambda: None)
    def close(self) -> None:
        """Finish what is under way and write what waits for the disk. Idempotent."""
        if not self._closed:
            self._closed = True
            self.end_all_sessions()
            self._transfers.close()
            self._manager.close()

    # Models that are refused at start

    def aligned_swa_window_size(self) -> int:
        return 0

    def reset_mamba_checkpoint_metadata(self, indices: Any) -> None:
        pass

    # Parts of the above

    def _custom_params(self, rid: str) -> Mapping[str, Any]:
        """What a queued request says to us; nothing where SGLang's scheduler is not as we know it."""
        try:
            req = None if self._access is None else self._access.waiting(rid)
            return {} if req is None or self._access is None else self._access.custom_params(req)
        except Exception as error:
            report_failure(self.metrics, "custom_params", error)
            return {}

    def _poll_blend(self, lookup: Lookup, hit_tokens: int) -> int | None:
        """How much is promised when passages count too; None while they are read."""
        if self._blending is None or lookup.flow is None:
            return hit_tokens
        try:
            promised: int | None = self._blending.poll(lookup, lookup.flow, hit_tokens)
            return promised
        except Exception as error:
            report_failure(self.metrics, "blend_plan", error)
            self.metrics.blend_fallback("error")
            return hit_tokens

    def _store(self, rid: str, token_ids: Sequence[int], slots: torch.Tensor, start: int, cache_salt: str) -> Store:
        tokens, blending = np.asarray(token_ids, dtype=np.int64), self._blending
        keys = self._engine.prefix_keys(tokens, paged=True, cache_salt=cache_salt)

        make_tail_known: Callable[[], None] | None = None
        if blending is not None:
            try:
                make_tail_known = blending.keep_tail(rid, keys, cache_salt)
            except Exception as error:
                report_failure(self.metrics, "blend_store", error)

        def kept() -> None:
            if blending is not None:
                blending.remember(rid, tokens, keys, start)
            if make_tail_known is not None:
                make_tail_known()

        # Last: SGLang must learn of a store under way, or gives its slots to others.
        return self._transfers.store(rid, tokens, slots, start, keys=keys, cache_salt=cache_salt, kept=kept)

    def _load(self, lookup: Lookup, load: Load, producer_stream: Any) -> None:
        blending = self._blending
        if lookup.wanted is None or lookup.wanted.prepared is None or blending is None:
            self._transfers.load(lookup, load, producer_stream)
            return
        whole = not load.local_hit_tokens
        self._transfers.blend(load, lambda: whole and blending.fill(lookup, load.device_indices), producer_stream)
        self._lookups.give_back(lookup)


def _nothing(request_id: str) -> Store:
    """A store that is done: nothing was to be kept, or nothing could be."""
    operation = Store(request_id, Future())
    operation.future.set_result(0)
    return operation
